#include "kept_chain.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "conv_chain.h"

namespace fastres::cpu {
namespace {

struct KeptChain {
  ConvChain chain;
  // Where tensors of the caller's are, and how they lie there.
  struct Place {
    Tensor tensor;
    const void* data;
    std::vector<int64_t> sizes, strides;
  };
  std::vector<Place> places;
};

std::vector<int64_t> ints(torch::headeronly::IntHeaderOnlyArrayRef values) {
  return {values.begin(), values.end()};
}

class KeptChains {
 public:
  int64_t add(KeptChain chain) {
    auto kept = std::make_shared<const KeptChain>(std::move(chain));
    const std::lock_guard lock(mutex_);
    chains_.emplace(++last_, std::move(kept));
    return last_;
  }

  std::shared_ptr<const KeptChain> get(int64_t id) {
    const std::lock_guard lock(mutex_);
    const auto it = chains_.find(id);
    return it == chains_.end() ? nullptr : it->second;
  }

  void drop(int64_t id) {
    std::shared_ptr<const KeptChain> dropped;  // after the lock: tensors go with it
    const std::lock_guard lock(mutex_);
    const auto it = chains_.find(id);
    if (it == chains_.end()) return;
    dropped = std::move(it->second);
    chains_.erase(it);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const KeptChain>> chains_;
  int64_t last_ = 0;
};

// Never destroyed: at the end of the process, tensors that Python made must not outlive it.
KeptChains& kept_chains() {
  static auto* const chains = new KeptChains;
  return *chains;
}

int64_t keep_conv_chain(const Tensor& input, const std::vector<Tensor>& tensors,
                        const std::vector<int64_t>& program, const std::vector<double>& eps,
                        const OptionalTensor& fc_weight, const OptionalTensor& fc_bias,
                        const std::vector<Tensor>& watched) {
  std::vector<KeptChain::Place> places;
  for (const Tensor& t : watched) {
    places.push_back({t, t.const_data_ptr(), ints(t.sizes()), ints(t.strides())});
  }
  ConvChain chain(input, tensors, program, eps, fc_weight, fc_bias);
  return kept_chains().add({std::move(chain), std::move(places)});
}

Tensor kept_conv_chain(const Tensor& input, int64_t chain) {
  const auto kept = kept_chains().get(chain);
  if (kept == nullptr) fail("kept_conv_chain", "chain must be one that is kept, got ", chain);
  return kept->chain.run(input);
}

}  // namespace

bool conv_chain_stays(int64_t chain) {
  const auto kept = kept_chains().get(chain);
  const auto stays = [](const KeptChain::Place& place) {
    const auto same = [](const std::vector<int64_t>& before, auto now) {
      return std::equal(before.begin(), before.end(), now.begin(), now.end());
    };
    const Tensor& t = place.tensor;
    return t.const_data_ptr() == place.data && same(place.sizes, t.sizes()) &&
           same(place.strides, t.strides());
  };
  return kept != nullptr && std::all_of(kept->places.begin(), kept->places.end(), stays);
}

void drop_conv_chain(int64_t chain) { kept_chains().drop(chain); }

}  // namespace fastres::cpu

// Not in register.cpp: these are for eager mode, where no graph and no other device sees them.
STABLE_TORCH_LIBRARY_FRAGMENT(fastres, m) {
  m.def(
      "keep_conv_chain(Tensor input, Tensor[] tensors, int[] program, float[] eps, "
      "Tensor? fc_weight, Tensor? fc_bias, Tensor[] watched) -> int");
  m.def("kept_conv_chain(Tensor input, int chain) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, m) {
  m.impl("keep_conv_chain", TORCH_BOX(&fastres::cpu::keep_conv_chain));
  m.impl("kept_conv_chain", TORCH_BOX(&fastres::cpu::kept_conv_chain));
}
