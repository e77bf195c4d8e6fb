// float32 convolutions of kept weights on the matrix unit's 8-bit integers. Numbers are rounded to
// integers, those to digits of 8 bits, and digits' products are added up in 32 bits without error:
// the Ozaki scheme, as by Ootomo, Ozaki and Yokota, "DGEMM on Integer Matrix Multiplication Unit",
// https://arxiv.org/abs/2306.11975.
//
// An image's part of a block is a power of two times integers of four digits. Weights are, for each
// output channel, a factor times integers of three digits where that is an error of at most 2^-22
// of the channel's norm, else of four; input channels whose weights are small are made larger
// before, by powers of two, and the images' channels smaller. Of the digits' products the four
// largest places are added up, which leaves out less than 2^-30 of the largest product. All of it
// is one byte a digit: weights take three quarters of their memory's bytes, and no splitting.
#pragma once

#include <optional>

#include "conv_shape.h"
#include "kernel_table.h"

namespace fastres::cpu {

// Whether it takes this shape.
bool digits_take(const ConvShape& s);

// Length of the packed weights, which is the same for three digits and for four; and for none,
// where weights are too far apart or not finite: then they are as run_amx takes them.
int64_t digits_packed_floats(const ConvShape& s);

void digits_pack(const ConvWeight& weight, const ConvShape& s, float* packed);

// As run_amx without statistics, where args.weight is what digits_pack packed. False also where an
// image's numbers are too far apart.
bool run_digits(const ConvArgs& args, const ConvShape& s);

}  // namespace fastres::cpu
