// SPDX-License-Identifier: Apache-2.0
#include <stdexcept>
#include <string>

#include "core/binding.h"
#include "emulation.h"
#include "planted.h"

namespace pkt {

void bind_emulation(py::module_& m) {
  m.def(
      "set_fiber_order",
      [](const std::string& order, uint64_t seed) {
        using emulation::Order;
        if (order == "ascending") return emulation::set_order(Order::ascending, seed);
        if (order == "descending") return emulation::set_order(Order::descending, seed);
        if (order == "random") return emulation::set_order(Order::random, seed);
        throw py::value_error("order: expected ascending, descending or random, got " + order);
      },
      py::arg("order"), py::arg("seed") = 0);
  m.def(
      "planted_reverse",
      [](py::handle values, py::handle out, const std::string& fault) {
        const TensorView in = view(values, "values", 1, {DType::f32});
        const TensorView to = view(out, "out", 1, {DType::f32});
        check_shape(to, "out", {in.shape[0]});
        planted::reverse_tiles(static_cast<const float*>(in.data), static_cast<float*>(to.data),
                               in.shape[0], planted::fault_of(fault));
      },
      py::arg("values"), py::arg("out"), py::arg("fault"));
  m.def(
      "set_shared_memory_limit", [](int64_t bytes) { ::emulation::shared_memory_limit = bytes; },
      py::arg("bytes"));
  m.def(
      "planted_multiply",
      [](py::handle a, py::handle b, py::handle out, bool transposed, const std::string& name) {
        const TensorView left = view(a, "a", 3, {DType::f16, DType::bf16});
        const TensorView right = view(b, "b", 3, {left.dtype});
        const TensorView to = view(out, "out", 2, {DType::f32});
        check_shape(left, "a", {2, 16, 16});
        check_shape(right, "b", {2, 16, 16});
        check_shape(to, "out", {16, 16});
        const auto run = [&](auto type) {
          using T = decltype(type);
          planted::multiply(static_cast<const T*>(left.data), static_cast<const T*>(right.data),
                            static_cast<float*>(to.data), transposed, planted::fault_of(name));
        };
        left.dtype == DType::f16 ? run(half{}) : run(bfloat16{});
      },
      py::arg("a"), py::arg("b"), py::arg("out"), py::arg("transposed"), py::arg("fault"));
  m.def(
      "planted_multiply_boxes",
      [](py::handle a, py::handle b, py::handle out, const std::string& name) {
        const TensorView left = view(a, "a", 2, {DType::f16, DType::bf16});
        const TensorView right = view(b, "b", 2, {left.dtype});
        const TensorView to = view(out, "out", 2, {DType::f32});
        check_shape(left, "a", {16, 64});
        check_shape(right, "b", {16, 192});
        check_shape(to, "out", {64, 192});
        const auto run = [&](auto type) {
          using T = decltype(type);
          planted::multiply_boxes(static_cast<const T*>(left.data),
                                  static_cast<const T*>(right.data), static_cast<float*>(to.data),
                                  planted::fault_of(name));
        };
        left.dtype == DType::f16 ? run(half{}) : run(bfloat16{});
      },
      py::arg("a"), py::arg("b"), py::arg("out"), py::arg("fault"));
}

}  // namespace pkt
