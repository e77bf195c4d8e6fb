#include "conv_log.h"

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>

#include "team.h"
#include "winograd.h"

namespace fastres::cpu {
namespace {

bool asked_for() {
  const char* value = std::getenv("FASTRES_LOG");
  if (value == nullptr || *value == '\0') return false;
  if (std::string(value) == "conv") return true;
  throw std::runtime_error(std::string("FASTRES_LOG must be conv, got '") + value + "'");
}

std::ostream& operator<<(std::ostream& out, const std::array<int64_t, 2>& pair) {
  return out << pair[0] << 'x' << pair[1];
}

}  // namespace

void log_convolution(const char* op, const ConvShape& s, DType dtype, const char* algorithm,
                     const char* reason) {
  static const bool logging = asked_for();
  if (!logging) return;
  std::ostringstream line;
  line << "fastres: " << op << ' ' << kDTypeNames[static_cast<int>(dtype)] << " input (" << s.n
       << ", " << s.ci << ", " << s.ih << ", " << s.iw << ") weight (" << s.co << ", "
       << s.ci / s.groups << ", " << s.kh << ", " << s.kw << ") stride " << s.stride << " padding "
       << s.padding;
  if (s.dilation[0] != 1 || s.dilation[1] != 1) line << " dilation " << s.dilation;
  if (s.groups != 1) line << " groups " << s.groups;
  line << ", " << thread_count() << " threads -> " << algorithm << ": " << reason;
  if (!winograd_allowed()) line << " (allow_winograd is False)";
  line << '\n';

  static std::mutex mutex;
  static std::set<std::string> seen;
  const std::lock_guard<std::mutex> lock(mutex);
  if (seen.insert(line.str()).second) std::fputs(line.str().c_str(), stderr);
}

}  // namespace fastres::cpu
