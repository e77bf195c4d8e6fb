// Chains that are kept, for models whose every call is the same chain: handing over hundreds of
// tensors and numbers takes longer than some convolutions. keep_conv_chain takes conv_chain's
// arguments and returns a number, kept_conv_chain another input of the kind and that number.
#pragma once

#include <cstdint>

#include "visibility.h"

namespace fastres::cpu {

// Whether the tensors that keep_conv_chain was told to watch still are where they were, of the same
// sizes and strides. False for a chain that is not kept.
FASTRES_EXPORTED bool conv_chain_stays(int64_t chain);

// Forgets a chain of keep_conv_chain's; calls that are under way end as they would.
FASTRES_EXPORTED void drop_conv_chain(int64_t chain);

}  // namespace fastres::cpu
