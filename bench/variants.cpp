// The CPU kernels of one state of the code behind one function, which bench/variants.py calls:
// compiled against that state's headers, linked with its objects.
#include "cpu/launch.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

namespace brn {
namespace {

// In as many pieces as torch's threads would take.
void share(std::int64_t begin, std::int64_t end, std::int64_t grain,
           void (*body)(std::int64_t begin, std::int64_t end, void* context), void* context) {
  const auto pieces = static_cast<int>(ceil_div(end - begin, grain));
#pragma omp parallel for num_threads(pieces) schedule(static, 1)
  for (int k = 0; k < pieces; ++k) {
    body(begin + k * grain, std::min(begin + (k + 1) * grain, end), context);
  }
}

enum Op { kForward, kBackward, kInference, kTrain };

// A layer, whose weights are 1 and whose averages move.
template <typename Real>
struct Layer {
  explicit Layer(std::int64_t channels)
      : stats(kStatRows * channels),
        running_std(channels, 1),
        weight(channels, 1),
        bias(channels),
        running_mean(channels),
        dweight(channels),
        dbias(channels) {}

  void forward(const Problem& p, const cpu::Parallel& parallel, const void* x, void* y) {
    auto params = from_x_to_y<ForwardParams>(x, y);
    params.stats = stats.data();
    params.limits = {3.0, 5.0};
    cpu::forward(p, params, parallel);
  }
  void backward(const Problem& p, const cpu::Parallel& parallel, const void* x, const void* dy,
                void* dx) {
    BackwardParams params;
    params.dy = dy;
    params.x = x;
    params.dx = dx;
    params.weight = weight.data();
    params.stats = stats.data();
    params.dweight = dweight.data();
    params.dbias = dbias.data();
    cpu::backward(p, params, parallel);
  }
  void inference(const Problem& p, const cpu::Parallel& parallel, const void* x, void* y) {
    cpu::inference(p, from_x_to_y<InferenceParams>(x, y), parallel);
  }
  template <typename Params>
  Params from_x_to_y(const void* x, void* y) {
    Params params;
    params.x = x;
    params.y = y;
    params.weight = weight.data();
    params.bias = bias.data();
    params.running_mean = running_mean.data();
    params.running_std = running_std.data();
    return params;
  }

  std::vector<Real> stats, running_std, weight, bias, running_mean, dweight, dbias;
};

struct Tensors {
  std::int64_t sets;
  const void* const* x;
  const void* const* dy;
  void* y;
  void* dx;
};

// As the layer after this one does.
std::uint64_t read(const Problem& p, int threads, const void* tensor) {
  const auto words = static_cast<const std::uint64_t*>(tensor);
  const std::int64_t count = p.elements() * size_of(p.dtype) / 8;
  std::uint64_t sum = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : sum)
  for (std::int64_t i = 0; i < count; ++i) sum += words[i];
  return sum;
}

template <typename Real>
double seconds(const Problem& p, Op op, const cpu::Parallel& parallel, const Tensors& tensors,
               bool reads, std::int64_t first, std::int64_t calls) {
  Layer<Real> layer(p.channels);
  if (op == kBackward) layer.forward(p, parallel, tensors.x[first % tensors.sets], tensors.y);
  volatile std::uint64_t sum = 0;
  const auto begin = std::chrono::steady_clock::now();
  for (std::int64_t call = first; call < first + calls; ++call) {
    const void* x = tensors.x[call % tensors.sets];
    const void* dy = tensors.dy[call % tensors.sets];
    if (op == kInference) layer.inference(p, parallel, x, tensors.y);
    if (op == kForward || op == kTrain) layer.forward(p, parallel, x, tensors.y);
    if (reads && op != kBackward) sum = sum + read(p, parallel.threads, tensors.y);
    if (op == kBackward || op == kTrain) layer.backward(p, parallel, x, dy, tensors.dx);
    if (reads && (op == kBackward || op == kTrain))
      sum = sum + read(p, parallel.threads, tensors.dx);
  }
  const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - begin;
  return passed.count();
}

}  // namespace
}  // namespace brn

// Seconds of `calls` calls, on the inputs from set `first` on, over and over again. `reads`: with
// what is written read once after each pass.
extern "C" __attribute__((visibility("default"))) double batchrenorm_seconds(
    std::int64_t batch, std::int64_t channels, std::int64_t spatial, int layout, int dtype, int op,
    int threads, std::int64_t sets, const void* const* x, const void* const* dy, void* y, void* dx,
    int reads, std::int64_t first, std::int64_t calls) {
  brn::Problem p;
  p.batch = batch;
  p.channels = channels;
  p.spatial = spatial;
  p.layout = static_cast<brn::Layout>(layout);
  p.dtype = static_cast<brn::DType>(dtype);
  const auto time = p.dtype == brn::DType::kFloat64 ? brn::seconds<double> : brn::seconds<float>;
  return time(p, static_cast<brn::Op>(op), {threads, brn::share}, {sets, x, dy, y, dx}, reads != 0,
              first, calls);
}
