// The operators of schema.cpp: check, guard, allocate, pack. What is left, to plan and to launch,
// is the Backend's:
//
//   Backend::Guard(x)                       makes x's device current, or says why there is none
//   Backend::forward(problem, params, x)    and likewise the other passes
#pragma once

#include "../core/ranks.h"
#include "../kernels/launch.h"
#include "allocate.h"
#include "checks.h"
#include "regions.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/headeronly/version.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>

namespace brn::binding {

inline const void* read(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }
inline void* write(const OptionalTensor& t) { return t ? t->mutable_data_ptr() : nullptr; }

inline Tensor new_stats(const Tensor& x) {
  const std::array<std::int64_t, 2> shape{kStatRows, x.size(1)};
  // An empty batch launches nothing that would write them.
  return x.numel() == 0 ? torch::stable::new_zeros(x, shape, statistic_type(x))
                        : empty(x, statistic_type(x), shape);
}

inline Tensor new_gradient(const Tensor& x) {
  const std::array<std::int64_t, 1> shape{x.size(1)};
  return x.numel() == 0 ? torch::stable::new_zeros(x, shape, statistic_type(x))
                        : empty(x, statistic_type(x), shape);
}

// What a training step is done to and with, beside the batch.
struct Step {
  const OptionalTensor &running_mean, &running_std, &num_batches_tracked, &schedule;
  std::optional<double> momentum;
  double eps, r_max, d_max;
  bool skip_nonfinite;

  void check(const Beside& x) const {
    check_channels(running_mean, x, "running_mean");
    check_channels(running_std, x, "running_std");
    require(running_mean.has_value() == running_std.has_value(),
            "running_mean and running_std must be given together, or neither of them");
    if (running_mean) check_in_place(*running_mean, "running_mean");
    if (running_std) check_in_place(*running_std, "running_std");
    if (num_batches_tracked) {
      require(num_batches_tracked->numel() == 1 &&
                  num_batches_tracked->scalar_type() == ScalarType::Long,
              "num_batches_tracked must be one int64, got ",
              NameOf{num_batches_tracked->scalar_type()}, " of shape ",
              ShapeOf{*num_batches_tracked});
      check_device(*num_batches_tracked, x, "num_batches_tracked");
    }
    if (schedule) {
      require(schedule->dim() == 1 && schedule->size(0) == 5 &&
                  schedule->scalar_type() == ScalarType::Double,
              "schedule must be float64 of shape [5], got ", NameOf{schedule->scalar_type()},
              " of shape ", ShapeOf{*schedule});
      check_device(*schedule, x, "schedule");
      require(num_batches_tracked.has_value(),
              "schedule needs num_batches_tracked, the step it is evaluated at");
    }
    require(momentum || num_batches_tracked,
            "momentum=None, the cumulative average, needs num_batches_tracked");
    require(!momentum || (*momentum >= 0 && *momentum <= 1), "momentum must be in [0, 1], got ",
            momentum.value_or(0));
    require(eps >= 0, "eps must be at least 0, got ", eps);
    require(r_max >= 1, "r_max must be at least 1, got ", r_max);
    require(d_max >= 0, "d_max must be at least 0, got ", d_max);
  }

  void pack(StepParams& params, const OptionalTensor& packed_schedule, const Tensor& stats) const {
    params.running_mean = write(running_mean);
    params.running_std = write(running_std);
    params.num_batches_tracked = static_cast<std::int64_t*>(write(num_batches_tracked));
    params.schedule = static_cast<const double*>(read(packed_schedule));
    params.stats = stats.mutable_data_ptr();
    params.limits = {r_max, d_max};
    params.momentum = momentum.value_or(kCumulative);
    params.epsilon = eps;
    params.skip_nonfinite = skip_nonfinite;
  }
};

template <typename Backend>
std::tuple<Tensor, Tensor> take(const Step& step, const Tensor& x, const OptionalTensor& weight,
                                const OptionalTensor& bias) {
  Tensor stats = new_stats(x);
  if (x.numel() == 0) return {torch::stable::empty_like(x), stats};

  const Layout layout = layout_of(x);
  const Tensor input = as(x, layout);
  const OptionalTensor packed_weight = packed(weight), packed_bias = packed(bias),
                       packed_schedule = packed(step.schedule);
  Tensor y = empty_as(input);

  ForwardParams params;
  params.x = input.const_data_ptr();
  params.y = y.mutable_data_ptr();
  params.weight = read(packed_weight);
  params.bias = read(packed_bias);
  step.pack(params, packed_schedule, stats);
  Backend::forward(problem_of(input, layout, {params.x, params.y}), params, input);
  return {y, stats};
}

// `stats` of a training step, or moving statistics: packed, and null where they are not what is
// normalised with.
struct Statistics {
  OptionalTensor stats, running_mean, running_std;

  explicit Statistics(const Tensor& stats_, const Tensor& x) {
    check_channels(stats_, x, "stats", kStatRows);
    stats = packed(stats_);
  }

  Statistics(const Tensor& mean, const Tensor& std, const Tensor& x) {
    check_channels(mean, x, "running_mean");
    check_channels(std, x, "running_std");
    running_mean = packed(mean);
    running_std = packed(std);
  }

  template <typename Params>
  void pack(Params& params) const {
    params.stats = read(stats);
    params.running_mean = read(running_mean);
    params.running_std = read(running_std);
  }
};

template <typename Backend>
Tensor normalize(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                 const Statistics& statistics) {
  check_channels(weight, x, "weight");
  check_channels(bias, x, "bias");
  if (x.numel() == 0) return torch::stable::empty_like(x);

  const Layout layout = layout_of(x);
  const Tensor input = as(x, layout);
  const OptionalTensor packed_weight = packed(weight), packed_bias = packed(bias);
  Tensor y = empty_as(input);

  InferenceParams params;
  params.x = input.const_data_ptr();
  params.y = y.mutable_data_ptr();
  params.weight = read(packed_weight);
  params.bias = read(packed_bias);
  statistics.pack(params);
  Backend::inference(problem_of(input, layout, {params.x, params.y}), params, input);
  return y;
}

// What a forward under activation checkpointing asks batchrenorm_cuda/repeats.py, through the
// dispatcher. `recall` gives the stats of the forward that this one repeats; nothing, if it is a
// new step; or throws, where it should be the one and is not. `record` writes down what a
// repetition needs: stats, of inference none.
inline Tensor recall(const Tensor& running_mean, bool training) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(running_mean),
                                    torch::stable::detail::from(training)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("batchrenorm::recall", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor found = torch::stable::detail::to<Tensor>(stack[0]);
  // The text of an error: an exception would lose it on its way through the C shim.
  if (found.scalar_type() == ScalarType::Byte)
    throw std::runtime_error(std::string(static_cast<const char*>(found.const_data_ptr()),
                                         static_cast<std::size_t>(found.numel())));
  return found;
}

inline void record(const Tensor& running_mean, const Tensor& running_std,
                   const OptionalTensor& stats, double eps) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(running_mean), torch::stable::detail::from(running_std),
      torch::stable::detail::from(stats), torch::stable::detail::from(eps)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("batchrenorm::record", "", stack.data(), TORCH_ABI_VERSION));
}

template <typename Backend>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& weight,
                                   const OptionalTensor& bias, const OptionalTensor& running_mean,
                                   const OptionalTensor& running_std,
                                   const OptionalTensor& num_batches_tracked,
                                   const OptionalTensor& schedule, std::optional<double> momentum,
                                   double eps, double r_max, double d_max, bool skip_nonfinite) {
  const typename Backend::Guard guard(x);
  check_input(x);
  const Beside beside(x);
  check_channels(weight, beside, "weight");
  check_channels(bias, beside, "bias");
  const Step step{running_mean, running_std, num_batches_tracked, schedule, momentum, eps,
                  r_max,        d_max,       skip_nonfinite};
  step.check(beside);
  require(x.numel() != x.size(1), "x must have more than one value per channel, got ", ShapeOf{x});

  if (!running_mean || !may_repeat()) return take<Backend>(step, x, weight, bias);

  const Tensor known = recall(*running_mean, true);
  const std::tuple<Tensor, Tensor> result =
      known.numel() > 0
          ? std::tuple{normalize<Backend>(x, weight, bias, Statistics(known, x)), known}
          : take<Backend>(step, x, weight, bias);
  record(*running_mean, *running_std, std::get<1>(result), eps);
  return result;
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> differentiate(const Tensor& dy, const Tensor& x,
                                                 const OptionalTensor& weight,
                                                 const Statistics& statistics) {
  check_cotangent(dy, x);
  check_channels(weight, x, "weight");
  Tensor dweight = new_gradient(x), dbias = new_gradient(x);
  if (x.numel() == 0) return {torch::stable::empty_like(x), dweight, dbias};

  const Layout layout = layout_of(x);
  const Tensor input = as(x, layout), cotangent = as(dy, layout);
  const OptionalTensor packed_weight = packed(weight);
  Tensor dx = empty_as(input);

  BackwardParams params;
  params.dy = cotangent.const_data_ptr();
  params.x = input.const_data_ptr();
  params.dx = dx.mutable_data_ptr();
  params.weight = read(packed_weight);
  statistics.pack(params);
  params.dweight = dweight.mutable_data_ptr();
  params.dbias = dbias.mutable_data_ptr();
  Backend::backward(problem_of(input, layout, {params.dy, params.x, params.dx}), params, input);
  return {dx, dweight, dbias};
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x,
                                            const OptionalTensor& weight, const Tensor& stats) {
  const typename Backend::Guard guard(x);
  check_input(x);
  return differentiate<Backend>(dy, x, weight, Statistics(stats, x));
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> inference_backward(const Tensor& dy, const Tensor& x,
                                                      const OptionalTensor& weight,
                                                      const Tensor& running_mean,
                                                      const Tensor& running_std) {
  const typename Backend::Guard guard(x);
  check_input(x);
  return differentiate<Backend>(dy, x, weight, Statistics(running_mean, running_std, x));
}

template <typename Backend>
Tensor renormalize(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                   const Tensor& stats) {
  const typename Backend::Guard guard(x);
  check_input(x);
  return normalize<Backend>(x, weight, bias, Statistics(stats, x));
}

template <typename Backend>
Tensor inference(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                 const Tensor& running_mean, const Tensor& running_std) {
  const typename Backend::Guard guard(x);
  check_input(x);
  if (may_repeat()) {
    recall(running_mean, false);
    record(running_mean, running_std, std::nullopt, 0);
  }
  return normalize<Backend>(x, weight, bias, Statistics(running_mean, running_std, x));
}

// The step that several ranks take together: schema.cpp says how.

inline Tensor new_exchanged(const Tensor& like, std::int64_t rows, std::int64_t columns,
                            bool zero) {
  const std::array<std::int64_t, 2> matrix{rows, columns};
  const std::array<std::int64_t, 1> vector{columns};
  const torch::headeronly::IntHeaderOnlyArrayRef shape =
      rows > 0 ? torch::headeronly::IntHeaderOnlyArrayRef(matrix)
               : torch::headeronly::IntHeaderOnlyArrayRef(vector);
  return zero ? torch::stable::new_zeros(like, shape, ScalarType::Double)
              : torch::stable::new_empty(like, shape, ScalarType::Double);
}

template <typename Backend>
Tensor moments(const Tensor& x, bool backward) {
  const typename Backend::Guard guard(x);
  check_input(x);
  const bool empty = x.numel() == 0;
  Tensor message = new_exchanged(x, 0, message_length(x.size(1)), empty);
  double* written = static_cast<double*>(message.mutable_data_ptr());
  if (empty) {
    if (backward) {
      Tensor flag = torch::stable::narrow(message, 0, message_length(x.size(1)) - 1, 1);
      torch::stable::fill_(flag, 1.0);
    }
    return message;
  }
  const Layout layout = layout_of(x);
  const Tensor input = as(x, layout);
  MomentsParams params;
  params.x = input.const_data_ptr();
  params.message = written;
  params.backward = backward;
  Backend::moments(problem_of(input, layout, {params.x}), params, input);
  return message;
}

template <typename Backend>
std::tuple<Tensor, Tensor> merge(const Tensor& gathered, ScalarType dtype,
                                 const OptionalTensor& running_mean,
                                 const OptionalTensor& running_std,
                                 const OptionalTensor& num_batches_tracked,
                                 const OptionalTensor& schedule, std::optional<double> momentum,
                                 double eps, double r_max, double d_max, bool skip_nonfinite) {
  const typename Backend::Guard guard(gathered);
  MergeParams params;
  params.dtype = dtype_of(dtype, "dtype");
  require(gathered.scalar_type() == ScalarType::Double && gathered.dim() == 2 &&
              gathered.size(0) > 0 && gathered.size(1) >= message_length(1) &&
              gathered.size(1) % 2 == 0,
          "gathered must be float64 of shape [ranks, 2 * C + 2], got ",
          NameOf{gathered.scalar_type()}, " of shape ", ShapeOf{gathered});
  params.channels = gathered.size(1) / 2 - 1;
  const Step step{running_mean, running_std, num_batches_tracked, schedule, momentum, eps,
                  r_max,        d_max,       skip_nonfinite};
  step.check(Beside(gathered, params.channels, dtype));

  const Tensor messages = packed(gathered);
  const OptionalTensor packed_schedule = packed(step.schedule);
  const std::array<std::int64_t, 2> shape{kStatRows, params.channels};
  Tensor stats = torch::stable::new_empty(gathered, shape, statistic_type(dtype));
  Tensor total = new_exchanged(gathered, 0, 2, false);
  params.gathered = static_cast<const double*>(messages.const_data_ptr());
  params.ranks = static_cast<int>(gathered.size(0));
  params.total = static_cast<double*>(total.mutable_data_ptr());
  step.pack(params, packed_schedule, stats);
  Backend::merge(params, gathered);
  return {stats, total};
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> backward_sums(const Tensor& dy, const Tensor& x,
                                                 const Tensor& stats) {
  const typename Backend::Guard guard(x);
  check_input(x);
  check_cotangent(dy, x);
  check_channels(stats, x, "stats", kStatRows);
  Tensor sums = new_exchanged(x, 2, x.size(1), x.numel() == 0);
  Tensor dweight = new_gradient(x), dbias = new_gradient(x);
  if (x.numel() == 0) return {sums, dweight, dbias};

  const Layout layout = layout_of(x);
  const Tensor input = as(x, layout), cotangent = as(dy, layout), packed_stats = packed(stats);
  BackwardSumsParams params;
  params.dy = cotangent.const_data_ptr();
  params.x = input.const_data_ptr();
  params.stats = packed_stats.const_data_ptr();
  params.sums = static_cast<double*>(sums.mutable_data_ptr());
  params.dweight = dweight.mutable_data_ptr();
  params.dbias = dbias.mutable_data_ptr();
  Backend::backward_sums(problem_of(input, layout, {params.dy, params.x}), params, input);
  return {sums, dweight, dbias};
}

template <typename Backend>
Tensor backward_project(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                        const Tensor& stats, const Tensor& sums, const Tensor& total) {
  const typename Backend::Guard guard(x);
  check_input(x);
  check_cotangent(dy, x);
  check_channels(weight, x, "weight");
  check_channels(stats, x, "stats", kStatRows);
  check_exchanged(sums, {2, x.size(1)}, x, "sums");
  check_exchanged(total, {2}, x, "total");
  if (x.numel() == 0) return torch::stable::empty_like(x);

  const Layout layout = layout_of(x);
  const Tensor input = as(x, layout), cotangent = as(dy, layout);
  const Tensor packed_stats = packed(stats), packed_sums = packed(sums),
               packed_total = packed(total);
  const OptionalTensor packed_weight = packed(weight);
  Tensor dx = torch::stable::empty_like(input);
  BackwardProjectParams params;
  params.dy = cotangent.const_data_ptr();
  params.x = input.const_data_ptr();
  params.dx = dx.mutable_data_ptr();
  params.weight = read(packed_weight);
  params.stats = packed_stats.const_data_ptr();
  params.sums = static_cast<const double*>(packed_sums.const_data_ptr());
  params.total = static_cast<const double*>(packed_total.const_data_ptr());
  Backend::backward_project(problem_of(input, layout, {params.dy, params.x, params.dx}), params,
                            input);
  return dx;
}

template <typename Backend, typename Library>
void add_operators(Library& m) {
  m.impl("forward", TORCH_BOX(&forward<Backend>));
  m.impl("backward", TORCH_BOX(&backward<Backend>));
  m.impl("renormalize", TORCH_BOX(&renormalize<Backend>));
  m.impl("inference", TORCH_BOX(&inference<Backend>));
  m.impl("inference_backward", TORCH_BOX(&inference_backward<Backend>));
  m.impl("moments", TORCH_BOX(&moments<Backend>));
  m.impl("merge", TORCH_BOX(&merge<Backend>));
  m.impl("backward_sums", TORCH_BOX(&backward_sums<Backend>));
  m.impl("backward_project", TORCH_BOX(&backward_project<Backend>));
}

}  // namespace brn::binding
