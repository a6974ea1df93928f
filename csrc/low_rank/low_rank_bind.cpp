// SPDX-License-Identifier: Apache-2.0
#include "core/binding.h"
#include "low_rank/low_rank.h"

namespace pkt {
namespace {

// A contiguous argument on the device of `other`.
TensorView dense(py::handle tensor, const char* name, int ndim,
                 std::initializer_list<DType> allowed, const TensorView* other = nullptr) {
  const TensorView found = view(tensor, name, ndim, allowed);
  check_contiguous(found, name);
  if (other != nullptr) check_device(found, name, *other);
  return found;
}

void check_rows(const char* op, const TensorView& tall, const char* name, int64_t lead,
                int64_t rows) {
  if (lead < 0 || lead + rows > tall.shape[0]) {
    throw py::value_error(std::string(op) + ": " + std::to_string(rows) + " rows from row " +
                          std::to_string(lead) + " do not fit " + name + " of shape " +
                          shape_text(tall));
  }
}

void split_slices(py::handle values, py::handle scale, py::handle slices, int64_t lead, int threads,
                  uintptr_t stream) {
  const TensorView v = dense(values, "values", 2, {DType::f32});
  const TensorView f = dense(scale, "scale", 1, {DType::f32}, &v);
  const TensorView s = dense(slices, "slices", 2, {DType::f16, DType::bf16}, &v);
  check_shape(f, "scale", {v.shape[1]});
  check_shape(s, "slices", {s.shape[0], 3 * v.shape[1]});
  check_rows("split_slices", s, "slices", lead, v.shape[0]);
  const SplitSlicesParams p{static_cast<const float*>(v.data),
                            static_cast<const float*>(f.data),
                            s.data,
                            s.dtype,
                            v.shape[0],
                            v.shape[1],
                            s.shape[0],
                            lead};
  if (s.numel() == 0) return;
  PKT_DISPATCH("split_slices", v, split_slices_cpu(p, threads),
               split_slices_cuda(p, reinterpret_cast<void*>(stream)));
}

void merge_slices(py::handle parts, py::handle scale, py::handle out, int64_t lead, int threads,
                  uintptr_t stream) {
  const TensorView s = dense(parts, "parts", 2, {DType::f32});
  const TensorView f = dense(scale, "scale", 1, {DType::f32}, &s);
  const TensorView o = dense(out, "out", 2, {DType::f32}, &s);
  check_shape(f, "scale", {o.shape[1]});
  check_shape(s, "parts", {s.shape[0], 3 * o.shape[1]});
  check_rows("merge_slices", s, "parts", lead, o.shape[0]);
  const MergeSlicesParams p{static_cast<const float*>(s.data),
                            static_cast<const float*>(f.data),
                            static_cast<float*>(o.data),
                            o.shape[0],
                            o.shape[1],
                            lead};
  if (o.numel() == 0) return;
  PKT_DISPATCH("merge_slices", s, merge_slices_cpu(p, threads),
               merge_slices_cuda(p, reinterpret_cast<void*>(stream)));
}

void orient_factors(py::handle left, py::handle right, py::handle left_scale,
                    py::handle right_scale, int threads, uintptr_t stream) {
  const TensorView l = dense(left, "left", 2, {DType::f32, DType::f64});
  const TensorView r = dense(right, "right", 2, {l.dtype}, &l);
  const TensorView a = dense(left_scale, "left_scale", 1, {l.dtype}, &l);
  const TensorView b = dense(right_scale, "right_scale", 1, {l.dtype}, &l);
  check_shape(r, "right", {l.shape[1], r.shape[1]});
  check_shape(a, "left_scale", {l.shape[1]});
  check_shape(b, "right_scale", {l.shape[1]});
  const OrientFactorsParams p{l.data,  r.data,     a.data,     b.data,
                              l.dtype, l.shape[0], r.shape[1], l.shape[1]};
  if (p.rank == 0) return;
  PKT_DISPATCH("orient_factors", l, orient_factors_cpu(p, threads),
               orient_factors_cuda(p, reinterpret_cast<void*>(stream)));
}

// A matrix on the CPU whose rows are contiguous.
TensorView by_rows(const char* op, py::handle matrix, std::initializer_list<DType> allowed) {
  const TensorView a = view(matrix, "matrix", 2, allowed);
  if (a.device >= 0) throw py::value_error(std::string(op) + ": expected tensors on the CPU");
  if (a.shape[1] > 1 && a.stride[1] != 1) {
    throw py::value_error("matrix: expected contiguous rows, got a column stride of " +
                          std::to_string(a.stride[1]));
  }
  return a;
}

double square_sum(py::handle matrix, int threads) {
  const TensorView a =
      by_rows("square_sum", matrix, {DType::f32, DType::f64, DType::f16, DType::bf16});
  const SquareSumParams p{a.data, a.dtype, a.shape[0], a.shape[1], a.stride[0]};
  py::gil_scoped_release release;
  return square_sum_cpu(p, threads);
}

void thin_product(py::handle matrix, py::handle thin, py::handle out, bool transposed,
                  bool accumulate, int threads, int variant) {
  const TensorView a = by_rows("thin_product", matrix, {DType::f32, DType::f16, DType::bf16});
  const TensorView t = dense(thin, "thin", 2, {DType::f32}, &a);
  const TensorView o = dense(out, "out", 2, {DType::f32}, &a);
  const int64_t columns = t.shape[0];
  if (columns % 8 != 0) {
    throw py::value_error("thin: expected a multiple of 8 rows, got " + std::to_string(columns));
  }
  check_shape(t, "thin", {columns, a.shape[transposed ? 0 : 1]});
  check_shape(o, "out", {columns, a.shape[transposed ? 1 : 0]});
  const ThinProductParams p{a.data,
                            static_cast<const float*>(t.data),
                            static_cast<float*>(o.data),
                            a.dtype,
                            a.shape[0],
                            a.shape[1],
                            a.stride[0],
                            columns,
                            transposed,
                            accumulate,
                            variant};
  py::gil_scoped_release release;
  thin_product_cpu(p, threads);
}

}  // namespace

void bind_low_rank(py::module_& m) {
  m.def("thin_product", &thin_product, py::arg("matrix"), py::arg("thin"), py::arg("out"),
        py::arg("transposed"), py::arg("accumulate") = false, py::arg("threads") = 1,
        py::arg("variant") = -1);
  m.def("square_sum", &square_sum, py::arg("matrix"), py::arg("threads") = 1);
  m.def("split_slices", &split_slices, py::arg("values"), py::arg("scale"), py::arg("slices"),
        py::arg("lead"), py::arg("threads"), py::arg("stream"));
  m.def("merge_slices", &merge_slices, py::arg("parts"), py::arg("scale"), py::arg("out"),
        py::arg("lead"), py::arg("threads"), py::arg("stream"));
  m.def("orient_factors", &orient_factors, py::arg("left"), py::arg("right"), py::arg("left_scale"),
        py::arg("right_scale"), py::arg("threads"), py::arg("stream"));
}

}  // namespace pkt
