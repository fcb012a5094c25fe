// The operations of decoding as PyTorch's dispatcher calls them: Python between a graph and a kernel would take as long
// as a small product. They hand the kernels of cpu_*.cpp, which know nothing of PyTorch, their numbers and addresses.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Numbers = std::vector<int64_t>;
using Given = const std::optional<Tensor>&;

void (*products)(const int64_t*), (*products_int8)(const int64_t*), (*attention)(const int64_t*, double);

int64_t at(const Tensor& t) { return (int64_t)t.data_ptr(); }
int64_t at(Given t) { return t ? at(*t) : 0; }

Numbers size(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }
Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Like x [..., K], but [..., n].
Tensor result(const Tensor& x, int64_t n) {
  Numbers sizes = size(x);
  sizes.back() = n;
  return torch::stable::new_empty(x, sizes);
}

std::vector<Tensor> matvecs(Tensor x, std::vector<Tensor> weights, std::vector<std::optional<Tensor>> biases) {
  x = dense(x);
  const int64_t k = x.size(-1), threads = torch::stable::get_num_threads();
  Numbers given{x.numel() / k, k, threads, (int64_t)weights.size(), at(x)};
  std::vector<Tensor> out;
  for (size_t i = 0; i < weights.size(); i++) {
    out.push_back(result(x, weights[i].size(0)));
    given.insert(given.end(), {at(weights[i]), at(biases[i]), at(out[i]), weights[i].size(0)});
  }
  products(given.data());
  return out;
}

Tensor matvec(Tensor x, Tensor weight, std::optional<Tensor> bias) { return matvecs(x, {weight}, {bias})[0]; }

Tensor matvec_int8(Tensor x, Tensor weight, Tensor scale, std::optional<Tensor> bias) {
  x = dense(x), scale = dense(scale);
  const int64_t n = weight.size(0), k = weight.size(1), wide = x.scalar_type() == ScalarType::Float;
  const int64_t threads = torch::stable::get_num_threads();
  Tensor y = result(x, n);
  const int64_t given[] = {x.numel() / k, n, k, scale.size(1), wide, threads, at(x), at(bias), at(y), at(weight), at(scale)};
  products_int8(given);
  return y;
}

Tensor few(Tensor q, Tensor k, Tensor v, std::optional<Tensor> rows, std::optional<Tensor> columns,
           std::optional<Tensor> start, bool causal, double scale) {
  for (Tensor* t : {&q, &k, &v})
    if (t->stride(-1) != 1) *t = torch::stable::contiguous(*t);
  const int64_t batch = q.size(0), queries = q.size(1), keys = k.size(1), half = q.scalar_type() == ScalarType::BFloat16;
  const auto right = [&](Given t, int64_t n) {
    return !t || (t->scalar_type() == ScalarType::Int && t->is_contiguous() && t->size(0) == batch && t->size(1) == n);
  };
  STD_TORCH_CHECK(right(rows, queries) && right(columns, keys), "segments must be dense int32 [B, S] and [B, L]");
  Tensor out = torch::stable::new_empty(q, size(q));
  const int64_t first = start ? *(const int64_t*)start->data_ptr() : 0, threads = torch::stable::get_num_threads();
  Numbers given{half, batch, queries, keys, q.size(2), k.size(2), q.size(3), causal, first, threads, at(rows), at(columns),
                0, 0, 0, 0, 1};  // as the struct Problem has them
  for (const Tensor* t : {&q, &k, &v, &out})
    given.insert(given.end(), {at(*t), t->stride(0), t->stride(1), t->stride(2)});
  given.resize(given.size() + 5 * 4);
  attention(given.data(), scale);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfunc, CPU, m) {
  m.impl("cpu_matvec", TORCH_BOX(&matvec));
  m.impl("cpu_matvecs", TORCH_BOX(&matvecs));
  m.impl("cpu_matvec_int8", TORCH_BOX(&matvec_int8));
  m.impl("cpu_attention_few", TORCH_BOX(&few));
}

// The kernels that are called from now on.
extern "C" void use(void* matvec, void* matvec_int8, void* attention_few) {
  products = (decltype(products))matvec, products_int8 = (decltype(products_int8))matvec_int8;
  attention = (decltype(attention))attention_few;
}
