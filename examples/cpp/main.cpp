// Runs a scripted model that has fastres' ops in it, without Python, and compares its logits with
// those that Python got for the same images.
#include <dlfcn.h>
#include <torch/script.h>

#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

namespace {

c10::Dict<c10::IValue, c10::IValue> load_dict(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "cannot read ", path);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  return torch::jit::pickle_load(bytes).toGenericDict();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: run_model LIBFASTRES MODEL EXPECTED\n";
    return 2;
  }
  // Registers the ops with torch, which must know them before it loads the model.
  if (dlopen(argv[1], RTLD_NOW) == nullptr) {
    std::cerr << "cannot load fastres: " << dlerror() << '\n';
    return 2;
  }
  try {
    const c10::InferenceMode inference;
    torch::jit::Module model = torch::jit::load(argv[2], torch::kCPU);
    model.eval();
    model = torch::jit::freeze(model);  // packs the weights for this processor, once

    const auto expected = load_dict(argv[3]);
    const at::Tensor logits = model.forward({expected.at("images")}).toTensor();
    const at::Tensor in_python = expected.at("logits").toTensor();
    const double error = ((logits - in_python).norm() / in_python.norm()).item<double>();
    std::cout << "logits " << logits.sizes() << ", relative error " << error << '\n';
    return error <= 1e-5 ? 0 : 1;
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 2;
  }
}
