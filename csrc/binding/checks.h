// What the operators refuse and how they see the rest: argument checks and memory formats, one copy
// for all devices.
//
// These checks keep direct callers of torch.ops.batchrenorm within memory. Python users meet
// ValueErrors earlier, in batchrenorm_cuda/functional.py.
#pragma once

#include "../core/types.h"
#include "require.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <ostream>

namespace brn::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Printed only when a check fails.
struct ShapeOf {
  const Tensor& tensor;
  friend std::ostream& operator<<(std::ostream& os, ShapeOf s) {
    os << '[';
    for (std::int64_t i = 0; i < s.tensor.dim(); ++i) os << (i ? ", " : "") << s.tensor.size(i);
    return os << ']';
  }
};

struct NameOf {
  ScalarType type;
  friend std::ostream& operator<<(std::ostream& os, NameOf n) {
    switch (n.type) {
      case ScalarType::Float: return os << "float32";
      case ScalarType::Half: return os << "float16";
      case ScalarType::BFloat16: return os << "bfloat16";
      case ScalarType::Double: return os << "float64";
      case ScalarType::Long: return os << "int64";
      default: return os << torch::headeronly::toString(n.type);
    }
  }
};

struct DeviceOf {
  const Tensor& tensor;
  friend std::ostream& operator<<(std::ostream& os, DeviceOf d) {
    if (d.tensor.is_cpu()) return os << "cpu";
    return os << (d.tensor.is_cuda() ? "cuda:" : "another device, index ")
              << d.tensor.get_device_index();
  }
};

inline DType dtype_of(ScalarType dtype, const char* name) {
  switch (dtype) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Double: return DType::kFloat64;
    default:
      require(false, name, " must be float32, float16, bfloat16 or float64, got ", NameOf{dtype});
      return DType::kFloat32;
  }
}

inline ScalarType statistic_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
inline ScalarType statistic_type(const Tensor& x) { return statistic_type(x.scalar_type()); }

inline void check_input(const Tensor& x) {
  require(x.dim() >= 2, "x must have shape [N, C, ...], got ", ShapeOf{x});
  require(x.size(1) > 0, "x must have at least one channel, got ", ShapeOf{x});
  dtype_of(x.scalar_type(), "x");
}

// What the tensors beside x have to fit: x itself, or, where it is not there, what is known of it.
struct Beside {
  Beside(const Tensor& x) : device(x), channels(x.size(1)), dtype(x.scalar_type()) {}
  Beside(const Tensor& device_, std::int64_t channels_, ScalarType dtype_)
      : device(device_), channels(channels_), dtype(dtype_) {}

  const Tensor& device;  // any tensor there
  std::int64_t channels;
  ScalarType dtype;
};

inline void check_device(const Tensor& t, const Beside& x, const char* name) {
  require(t.device() == x.device.device(), name, " must be on the device of x, ",
          DeviceOf{x.device}, ", got ", DeviceOf{t});
}

inline void check_cotangent(const Tensor& dy, const Tensor& x) {
  bool same = dy.dim() == x.dim();
  for (std::int64_t i = 0; same && i < x.dim(); ++i) same = dy.size(i) == x.size(i);
  require(same, "dy must have the shape of x, ", ShapeOf{x}, ", got ", ShapeOf{dy});
  require(dy.scalar_type() == x.scalar_type(), "dy must be ", NameOf{x.scalar_type()},
          " as x, got ", NameOf{dy.scalar_type()});
  check_device(dy, x, "dy");
}

// A tensor of one statistic, weight or bias a channel; or of `rows` of them.
inline void check_channels(const Tensor& t, const Beside& x, const char* name,
                           std::int64_t rows = 0) {
  const std::int64_t channels = x.channels;
  if (rows == 0) {
    require(t.dim() == 1 && t.size(0) == channels, name, " must have shape [", channels, "], got ",
            ShapeOf{t});
  } else {
    require(t.dim() == 2 && t.size(0) == rows && t.size(1) == channels, name, " must have shape [",
            rows, ", ", channels, "], got ", ShapeOf{t});
  }
  const ScalarType type = statistic_type(x.dtype);
  require(t.scalar_type() == type, name, " must be ", NameOf{type}, " for x in ", NameOf{x.dtype},
          ", got ", NameOf{t.scalar_type()});
  check_device(t, x, name);
}

inline void check_channels(const OptionalTensor& t, const Beside& x, const char* name) {
  if (t) check_channels(*t, x, name);
}

// What ranks exchange is float64, whatever x is.
inline void check_exchanged(const Tensor& t, std::initializer_list<std::int64_t> shape,
                            const Beside& x, const char* name) {
  bool same =
      t.scalar_type() == ScalarType::Double && t.dim() == static_cast<std::int64_t>(shape.size());
  for (std::int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == shape.begin()[i];
  std::ostringstream wanted;
  if (!same) {
    for (const std::int64_t size : shape) wanted << (wanted.tellp() > 0 ? ", " : "") << size;
  }
  require(same, name, " must be float64 of shape [", wanted.str(), "], got ",
          NameOf{t.scalar_type()}, " of shape ", ShapeOf{t});
  check_device(t, x, name);
}

// What is written in place has to be written where it is.
inline void check_in_place(const Tensor& t, const char* name) {
  require(t.is_contiguous(), name, " must be contiguous: it is updated in place");
}

// Whether x fills its memory in this order without gaps or overlaps. The stride of a dimension of
// one is never used.
inline bool is_dense(const Tensor& x, Layout layout) {
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  std::int64_t expected = 1;
  const auto follows = [&](std::int64_t i) {
    const bool fits = sizes[i] == 1 || strides[i] == expected;
    expected *= sizes[i];
    return fits;
  };
  if (layout == Layout::kChannelsLast && !follows(1)) return false;
  for (std::int64_t i = x.dim() - 1; i > 0; --i) {
    if ((i > 1 || layout == Layout::kChannelsFirst) && !follows(i)) return false;
  }
  return follows(0);
}

// A copy of x in this order. contiguous() knows channels_last for 4 and 5 dimensions only, so C is
// moved by hand.
inline Tensor copy_as(Tensor x, Layout layout) {
  const std::int64_t last = x.dim() - 1;
  if (layout == Layout::kChannelsFirst) return torch::stable::contiguous(x);
  for (std::int64_t i = 1; i < last; ++i) x = torch::stable::transpose(x, i, i + 1);
  x = torch::stable::contiguous(x);
  for (std::int64_t i = last; i > 1; --i) x = torch::stable::transpose(x, i, i - 1);
  return x;
}

// Memory from elsewhere (DLPack, frombuffer) may start between two elements.
inline Tensor aligned(const Tensor& x) {
  const auto address = reinterpret_cast<std::uintptr_t>(x.const_data_ptr());
  return address % x.element_size() == 0 ? x : torch::stable::clone(x);
}

inline Tensor as(const Tensor& x, Layout layout) {
  return aligned(is_dense(x, layout) ? x : copy_as(x, layout));
}

// Columns of weights may come expanded or strided: kernels read them as [C], or as [rows][C].
inline Tensor packed(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}
inline OptionalTensor packed(const OptionalTensor& t) {
  return t ? OptionalTensor(packed(*t)) : std::nullopt;
}

// The format that the kernels read x in. With one pixel a channel (2-D input) it is a matrix of
// rows, whichever way one looks at it.
inline Layout layout_of(const Tensor& x) {
  const bool one_pixel = x.numel() == x.size(0) * x.size(1);
  if (!one_pixel && is_dense(x, Layout::kChannelsFirst)) return Layout::kChannelsFirst;
  if (one_pixel || is_dense(x, Layout::kChannelsLast)) return Layout::kChannelsLast;
  return x.dim() > 2 && x.stride(1) == 1 ? Layout::kChannelsLast : Layout::kChannelsFirst;
}

inline int alignment_of(std::initializer_list<const void*> pointers) {
  std::uintptr_t bits = 16;
  for (const void* pointer : pointers) bits |= reinterpret_cast<std::uintptr_t>(pointer);
  return static_cast<int>(bits & (~bits + 1));
}

// x is dense in this layout, and not empty.
inline Problem problem_of(const Tensor& x, Layout layout,
                          std::initializer_list<const void*> pointers) {
  Problem p;
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.spatial = x.numel() / (p.batch * p.channels);
  p.layout = layout;
  p.dtype = dtype_of(x.scalar_type(), "x");
  p.alignment = alignment_of(pointers);
  if (p.channels == 1) {  // one long row: the widest accesses
    p.spatial *= p.batch;
    p.batch = 1;
    p.layout = Layout::kChannelsFirst;
  }
  return p;
}

}  // namespace brn::binding
