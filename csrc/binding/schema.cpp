// The operators, as Torch sees them. This file is the C++ API: read it first.
//
// x, y, dy, dx: [N, C, ...], float32, float16, bfloat16 or float64. Every tensor of C values, and
// stats [5, C], is float32 (float64 for a float64 x). stats is what backward needs of a forward:
// rows centre (near the mean), mean - centre, 1 / std, r, d.
#include <torch/csrc/stable/library.h>

// Moving statistics and the step counter are mutated, so the schema says so; no output aliases an
// input; everything that backward needs is returned, so that the autograd rule
// (batchrenorm_cuda/functional.py) never reaches into a module.
STABLE_TORCH_LIBRARY(batchrenorm, m) {
  // A training step. With `schedule` [5] the limits come from it, evaluated at num_batches_tracked;
  // without, they are r_max and d_max. momentum None is the cumulative average 1 /
  // (num_batches_tracked + 1).
  m.def(
      "forward(Tensor x, Tensor? weight, Tensor? bias, "
      "Tensor(a!)? running_mean, Tensor(b!)? running_std, Tensor(c!)? num_batches_tracked, Tensor? "
      "schedule, "
      "float? momentum, float eps, float r_max, float d_max, bool skip_nonfinite) -> (Tensor y, "
      "Tensor stats)");
  m.def(
      "backward(Tensor dy, Tensor x, Tensor? weight, Tensor stats) -> (Tensor dx, Tensor dweight, "
      "Tensor dbias)");

  // The normalisation alone, with the statistics of an earlier forward: what activation
  // checkpointing recomputes.
  m.def("renormalize(Tensor x, Tensor? weight, Tensor? bias, Tensor stats) -> Tensor");

  m.def(
      "inference(Tensor x, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_std) "
      "-> Tensor");
  m.def(
      "inference_backward(Tensor dy, Tensor x, Tensor? weight, Tensor running_mean, Tensor "
      "running_std) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias)");

  // A training step that several ranks take together, in four operators and two collectives of the
  // caller: ranks gather their `message`s, float64 [2 * C + 2] (core/ranks.h), `merge` does with
  // all of them, [ranks, 2 * C + 2], what forward does with a batch, on every rank the same, and
  // renormalize gives y. Going back, ranks add up their `sums`, float64 [2, C] (sum of dy, sum of
  // dy * (x - mean)), and project with them. dweight and dbias are the rank's own. `total` is
  // float64 [2]: values of a channel, and ranks that said `backward`. `dtype` is that of x.
  m.def("moments(Tensor x, bool backward) -> Tensor message");
  m.def(
      "merge(Tensor gathered, ScalarType dtype, Tensor(a!)? running_mean, Tensor(b!)? running_std, "
      "Tensor(c!)? num_batches_tracked, Tensor? schedule, float? momentum, float eps, float r_max, "
      "float d_max, bool skip_nonfinite) -> (Tensor stats, Tensor total)");
  m.def(
      "backward_sums(Tensor dy, Tensor x, Tensor stats) -> (Tensor sums, Tensor dweight, Tensor "
      "dbias)");
  m.def(
      "backward_project(Tensor dy, Tensor x, Tensor? weight, Tensor stats, Tensor sums, Tensor "
      "total) -> Tensor dx");
}
