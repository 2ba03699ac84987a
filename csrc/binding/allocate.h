// New tensors on the device of another one.
//
// By the C shim and not by torch::stable::new_empty and empty_like, which look the operator up by
// its name and box their arguments: 6,600 instructions a tensor of five in a training step, where
// these take 1,700.
#pragma once

#include "require.h"

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <cstddef>
#include <cstdint>

namespace brn::binding {

inline torch::stable::Tensor empty_strided(const torch::stable::Tensor& beside, std::int32_t dtype,
                                           std::int64_t dim, const std::int64_t* sizes,
                                           const std::int64_t* strides) {
  std::int32_t type = 0;
  std::int32_t index = 0;
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(beside.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(beside.get(), &index));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, dtype, type, index, &made));
  return torch::stable::Tensor(made);
}

// Of the shape, strides and dtype of x, which is dense.
inline torch::stable::Tensor empty_as(const torch::stable::Tensor& x) {
  std::int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  const auto sizes = x.sizes();
  return empty_strided(x, dtype, x.dim(), sizes.data(), x.strides().data());
}

// Contiguous.
template <std::size_t kDim>
torch::stable::Tensor empty(const torch::stable::Tensor& beside, torch::headeronly::ScalarType type,
                            const std::array<std::int64_t, kDim>& shape) {
  std::array<std::int64_t, kDim> strides;
  strides.back() = 1;
  for (std::size_t i = kDim; i-- > 1;) strides[i - 1] = strides[i] * shape[i];
  const auto dtype = torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(type));
  return empty_strided(beside, dtype, kDim, shape.data(), strides.data());
}

}  // namespace brn::binding
