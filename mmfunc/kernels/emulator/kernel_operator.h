// Stands in for CANN's header of the same name, so that the kernels of csrc/ascend compile for the host.
#pragma once
#include "cube.h"
