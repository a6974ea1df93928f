// SPDX-License-Identifier: Apache-2.0
#include "core/binding.h"

#include <iterator>
#include <unordered_map>

namespace pkt {
namespace {

const char* const kNames[] = {"float32", "float64", "float16", "bfloat16",
                              "int64",   "int32",   "uint8"};

// torch's dtype objects are singletons, so their addresses can be remembered.
bool lookup(py::handle dtype, DType& out) {
  static std::unordered_map<PyObject*, int> known;
  auto found = known.find(dtype.ptr());
  if (found == known.end()) {
    const std::string name = py::str(dtype);
    int code = -1;
    for (size_t i = 0; i < std::size(kNames); ++i) {
      if (name == std::string("torch.") + kNames[i]) code = static_cast<int>(i);
    }
    found = known.emplace(dtype.ptr(), code).first;
  }
  out = static_cast<DType>(found->second);
  return found->second >= 0;
}

std::string list_text(const int64_t* values, size_t count) {
  std::string text = "[";
  for (size_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

}  // namespace

TensorView view(py::handle tensor, const char* name, int ndim,
                std::initializer_list<DType> allowed) {
  if (!py::hasattr(tensor, "data_ptr")) {
    throw py::type_error(std::string(name) + ": expected a torch.Tensor, got " +
                         std::string(py::str(py::type::handle_of(tensor))));
  }
  TensorView out;
  const py::object dtype = tensor.attr("dtype");
  bool known = lookup(dtype, out.dtype);
  bool permitted = false;
  std::string wanted;
  for (DType candidate : allowed) {
    permitted |= known && candidate == out.dtype;
    wanted += (wanted.empty() ? "" : ", ") + std::string(kNames[static_cast<int>(candidate)]);
  }
  if (!permitted) {
    throw py::type_error(std::string(name) + ": expected dtype " + wanted + ", got " +
                         std::string(py::str(dtype)));
  }
  const py::tuple shape = tensor.attr("shape");
  const py::tuple stride = tensor.attr("stride")();
  if (static_cast<int>(shape.size()) != ndim) {
    throw py::value_error(std::string(name) + ": expected " + std::to_string(ndim) +
                          " dimensions, got shape " + std::string(py::str(py::list(shape))));
  }
  out.ndim = ndim;
  for (int i = 0; i < ndim; ++i) {
    out.shape[i] = shape[i].cast<int64_t>();
    out.stride[i] = stride[i].cast<int64_t>();
  }
  if (tensor.attr("is_cuda").cast<bool>()) {
    out.device = tensor.attr("device").attr("index").cast<int>();
  } else if (!tensor.attr("is_cpu").cast<bool>()) {
    throw py::value_error(std::string(name) + ": expected a CPU or CUDA tensor, got device " +
                          std::string(py::str(tensor.attr("device"))));
  }
  out.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
  return out;
}

std::string shape_text(const TensorView& view) {
  return list_text(view.shape, static_cast<size_t>(view.ndim));
}

void check_shape(const TensorView& view, const char* name,
                 std::initializer_list<int64_t> expected) {
  bool same = view.ndim == static_cast<int>(expected.size());
  int i = 0;
  for (int64_t size : expected) same = same && view.shape[i++] == size;
  if (!same) {
    throw py::value_error(std::string(name) + ": expected shape " +
                          list_text(expected.begin(), expected.size()) + ", got " +
                          shape_text(view));
  }
}

void check_device(const TensorView& view, const char* name, const TensorView& other) {
  if (view.device != other.device) {
    throw py::value_error(std::string(name) + ": lies on another device than the first tensor");
  }
}

void check_contiguous(const TensorView& view, const char* name) {
  int64_t expected = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    if (view.shape[i] != 1 && view.stride[i] != expected && view.numel() > 0) {
      throw py::value_error(std::string(name) + ": expected a contiguous tensor, got strides " +
                            list_text(view.stride, static_cast<size_t>(view.ndim)) + " for shape " +
                            shape_text(view));
    }
    expected *= view.shape[i];
  }
}

void raise_not_built(const char* op) {
  PyErr_Format(PyExc_NotImplementedError,
               "%s: this build of pkt_ext has no CUDA kernels; reinstall with a CUDA toolkit on "
               "PATH and PKT_EXT_CUDA=1, or move the tensors to the CPU",
               op);
  throw py::error_already_set();
}

}  // namespace pkt
