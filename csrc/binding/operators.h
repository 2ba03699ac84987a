// The operators of schema.cpp: check, guard, allocate, pack. What is left, to plan and to launch,
// is the Backend's:
//
//   Backend::Guard(x)                       makes x's device current, or says why there is none
//   Backend::forward(problem, params, x)    and likewise backward and inference
#pragma once

#include "../kernels/launch.h"
#include "allocate.h"
#include "checks.h"

#include <torch/csrc/stable/library.h>

#include <array>
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

template <typename Backend>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& weight,
                                   const OptionalTensor& bias, const OptionalTensor& running_mean,
                                   const OptionalTensor& running_std,
                                   const OptionalTensor& num_batches_tracked,
                                   const OptionalTensor& schedule, std::optional<double> momentum,
                                   double eps, double r_max, double d_max, bool skip_nonfinite) {
  const typename Backend::Guard guard(x);
  check_input(x);
  check_channels(weight, x, "weight");
  check_channels(bias, x, "bias");
  check_channels(running_mean, x, "running_mean");
  check_channels(running_std, x, "running_std");
  require(running_mean.has_value() == running_std.has_value(),
          "running_mean and running_std must be given together, or neither of them");
  if (running_mean) check_in_place(*running_mean, "running_mean");
  if (running_std) check_in_place(*running_std, "running_std");
  if (num_batches_tracked) {
    require(
        num_batches_tracked->numel() == 1 && num_batches_tracked->scalar_type() == ScalarType::Long,
        "num_batches_tracked must be one int64, got ", NameOf{num_batches_tracked->scalar_type()},
        " of shape ", ShapeOf{*num_batches_tracked});
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

  Tensor stats = new_stats(x);
  if (x.numel() == 0) return {torch::stable::empty_like(x), stats};

  const Layout layout = layout_of(x);
  const Tensor input = as(x, layout);
  const OptionalTensor packed_weight = packed(weight), packed_bias = packed(bias),
                       packed_schedule = packed(schedule);
  Tensor y = empty_as(input);

  ForwardParams params;
  params.x = input.const_data_ptr();
  params.y = y.mutable_data_ptr();
  params.weight = read(packed_weight);
  params.bias = read(packed_bias);
  params.running_mean = write(running_mean);
  params.running_std = write(running_std);
  params.num_batches_tracked = static_cast<std::int64_t*>(write(num_batches_tracked));
  params.schedule = static_cast<const double*>(read(packed_schedule));
  params.stats = stats.mutable_data_ptr();
  params.limits = {r_max, d_max};
  params.momentum = momentum.value_or(kCumulative);
  params.epsilon = eps;
  params.skip_nonfinite = skip_nonfinite;
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
  return normalize<Backend>(x, weight, bias, Statistics(running_mean, running_std, x));
}

template <typename Backend, typename Library>
void add_operators(Library& m) {
  m.impl("forward", TORCH_BOX(&forward<Backend>));
  m.impl("backward", TORCH_BOX(&backward<Backend>));
  m.impl("renormalize", TORCH_BOX(&renormalize<Backend>));
  m.impl("inference", TORCH_BOX(&inference<Backend>));
  m.impl("inference_backward", TORCH_BOX(&inference_backward<Backend>));
}

}  // namespace brn::binding
