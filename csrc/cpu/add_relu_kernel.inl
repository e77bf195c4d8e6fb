// relu(input + residual) and its gradient on dense elements.
namespace fastres::cpu::FASTRES_ISA {

template <typename T>
void add_relu(const void* input, const void* residual, void* y, bool stream, int64_t begin,
              int64_t end) {
  constexpr int lanes = Compute<T>::lanes;
  const T* a = static_cast<const T*>(input);
  const T* b = static_cast<const T*>(residual);
  T* out = static_cast<T*>(y);
  int64_t i = begin;
  for (; i + lanes <= end; i += lanes) store(out + i, relu(load(a + i) + load(b + i)), stream);
  if (const int n = static_cast<int>(end - i); n > 0) {
    store_partial(out + i, relu(load_partial(a + i, n) + load_partial(b + i, n)), n);
  }
  end_stream(stream);
}

// dy where not (y <= 0): a NaN in y lets the gradient pass.
template <typename T>
void add_relu_backward(const void* dy, const void* y, void* dinput, bool stream, int64_t begin,
                       int64_t end) {
  using V = typename Compute<T>::vec;
  constexpr int lanes = Compute<T>::lanes;
  const T* g = static_cast<const T*>(dy);
  const T* out = static_cast<const T*>(y);
  T* d = static_cast<T*>(dinput);
  int64_t i = begin;
  for (; i + lanes <= end; i += lanes) {
    store(d + i, select(load(out + i) <= V{}, V{}, load(g + i)), stream);
  }
  if (const int n = static_cast<int>(end - i); n > 0) {
    store_partial(d + i, select(load_partial(out + i, n) <= V{}, V{}, load_partial(g + i, n)), n);
  }
  end_stream(stream);
}

}  // namespace fastres::cpu::FASTRES_ISA
