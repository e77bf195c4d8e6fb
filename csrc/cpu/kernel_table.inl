// Compiled once for each instruction set: a kernels_<isa>.cpp defines FASTRES_ISA and includes
// this. Everything in here lives in namespace fastres::cpu::<isa>. The *_kernel.inl files use no
// inline function or template of the standard library: the linker keeps one copy of such a function
// for all instruction sets, and it could be one that this processor cannot run.
#include "kernel_table.h"
#include "vec.h"
// After vec.h, on which they build.
#include "add_relu_kernel.inl"
#include "avg_pool_linear_kernel.inl"
#include "bn_add_relu_kernel.inl"
#include "conv_backward_kernel.inl"
#include "conv_kernel.inl"
#include "max_pool2d_kernel.inl"
#include "winograd_kernel.inl"
// After winograd_kernel.inl, on which it builds.
#include "winograd_stem_kernel.inl"
#if defined(__AMX_BF16__)
#include "conv_amx_kernel.inl"
// After conv_amx_kernel.inl, on which it builds.
#include "amx_gradient_kernel.inl"
#include "conv_digits_kernel.inl"
#include "winograd_amx_kernel.inl"
#endif

namespace fastres::cpu::FASTRES_ISA {

// The entries of one storage type.
template <typename T>
constexpr void set_entries(KernelTable& t, DType dtype) {
  const int d = static_cast<int>(dtype);
  t.add_relu[d] = add_relu<T>;
  t.add_relu_backward[d] = add_relu_backward<T>;
  t.prologue_backward[d] = bn_add_relu_backward<T, Residual::none, Mask::affine>;
  t.bn_stats_backward[d] = bn_stats_backward<T>;
  t.channel_sums[d] = channel_sums<T>;
  t.max_pool2d[d][false] = max_pool2d<T, false>;
  t.max_pool2d[d][true] = max_pool2d<T, true>;
  t.max_pool2d_backward[d][false] = max_pool2d_backward<T, false>;
  t.max_pool2d_backward[d][true] = max_pool2d_backward<T, true>;
  t.avg_pool[d] = avg_pool<T>;
  t.linear[d] = linear<T>;
  auto set_residual = [&]<Residual R>() {
    const int r = static_cast<int>(R);
    t.bn_add_relu[d][r][false] = bn_add_relu<T, R, false>;
    t.bn_add_relu[d][r][true] = bn_add_relu<T, R, true>;
    t.bn_add_relu_backward[d][r][false] = bn_add_relu_backward<T, R, Mask::none>;
    t.bn_add_relu_backward[d][r][true] = bn_add_relu_backward<T, R, Mask::output>;
  };
  set_residual.template operator()<Residual::none>();
  set_residual.template operator()<Residual::plain>();
  set_residual.template operator()<Residual::bn>();
}

constexpr KernelTable make_table() {
  KernelTable t{};
  t.vector_bytes = kVecBytes;
  t.conv_gather = conv_gather;
  t.conv_scatter_add = conv_scatter_add;
  set_entries<float>(t, DType::float32);
  set_entries<bfloat16>(t, DType::bfloat16);
  set_entries<float16>(t, DType::float16);
  set_entries<double>(t, DType::float64);
  t.conv_rows = kConvRows;
  t.conv_columns = kConvColumns;
  t.conv_block[static_cast<int>(DType::float32)] = conv_block<float>;
  t.conv_block[static_cast<int>(DType::bfloat16)] = conv_block<bfloat16>;
  t.conv_block[static_cast<int>(DType::float16)] = conv_block<float16>;
  t.conv_pack = conv_pack;
  t.conv_fold = conv_fold;
  auto set_winograd = [&]<int O>(int index) {
    auto set_blocks = [&]<int S, typename Form>(WinogradBlockFn* blocks) {
      blocks[static_cast<int>(DType::float32)] = winograd_block<float, O, S, Form>;
      blocks[static_cast<int>(DType::bfloat16)] = winograd_block<bfloat16, O, S, Form>;
      blocks[static_cast<int>(DType::float16)] = winograd_block<float16, O, S, Form>;
    };
    set_blocks.template operator()<1, WinogradFloats<O, 1>>(t.winograd_block[0][index]);
    set_blocks.template operator()<2, WinogradFloats<O, 2>>(t.winograd_block[1][index]);
    t.winograd_pack[0][index] = winograd_pack<O, 1>;
    t.winograd_pack[1][index] = winograd_pack<O, 2>;
#if defined(__AMX_BF16__)
    set_blocks.template operator()<1, WinogradParts<O>>(t.winograd_amx_block[index]);
    t.winograd_amx_pack[index] = winograd_amx_pack<O>;
#endif
  };
  t.winograd_gradient[static_cast<int>(DType::float32)] = winograd_gradient<float>;
  t.winograd_gradient[static_cast<int>(DType::bfloat16)] = winograd_gradient<bfloat16>;
  t.winograd_gradient[static_cast<int>(DType::float16)] = winograd_gradient<float16>;
  t.winograd_gradient_end = winograd_gradient_end;
  t.stem_block[static_cast<int>(DType::float32)] = stem_block<float>;
  t.stem_block[static_cast<int>(DType::bfloat16)] = stem_block<bfloat16>;
  t.stem_block[static_cast<int>(DType::float16)] = stem_block<float16>;
  t.stem_pack = stem_pack;
#if defined(__AMX_BF16__)
  t.amx_block[static_cast<int>(DType::float32)] = amx_conv_block<float>;
  t.amx_block[static_cast<int>(DType::bfloat16)] = amx_conv_block<bfloat16>;
  t.amx_block[static_cast<int>(DType::float16)] = amx_conv_block<float16>;
  t.digits_block = digits_conv_block;
  t.amx_pack[static_cast<int>(DType::float32)] = amx_pack<kAmxPartsOf<float>>;
  t.amx_pack[static_cast<int>(DType::bfloat16)] = amx_pack<kAmxPartsOf<bfloat16>>;
  t.amx_pack[static_cast<int>(DType::float16)] = amx_pack<kAmxPartsOf<float16>>;
  t.amx_gradient[static_cast<int>(DType::float32)] = amx_gradient<float>;
  t.amx_gradient[static_cast<int>(DType::bfloat16)] = amx_gradient<bfloat16>;
  t.amx_gradient_end = amx_gradient_end;
#endif
  set_winograd.template operator()<4>(0);
  set_winograd.template operator()<2>(1);
  return t;
}

constinit const KernelTable table = make_table();

}  // namespace fastres::cpu::FASTRES_ISA
