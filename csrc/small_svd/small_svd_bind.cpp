// SPDX-License-Identifier: Apache-2.0
#include "core/binding.h"
#include "small_svd/small_svd.h"

namespace pkt {
namespace {

// A contiguous argument on the device of `other`, of the shape given.
TensorView dense(py::handle tensor, const char* name, DType dtype, const TensorView& other,
                 std::initializer_list<int64_t> shape) {
  const TensorView found = view(tensor, name, static_cast<int>(shape.size()), {dtype});
  check_shape(found, name, shape);
  check_contiguous(found, name);
  check_device(found, name, other);
  return found;
}

TensorView view_batch(py::handle tensor, const char* name, std::initializer_list<DType> allowed) {
  const TensorView found = view(tensor, name, 3, allowed);
  check_contiguous(found, name);
  return found;
}

TensorView view_gram(py::handle gram) {
  const TensorView g = view_batch(gram, "gram", {DType::f64});
  check_shape(g, "gram", {g.shape[0], g.shape[1], g.shape[1]});
  return g;
}

bool cholesky_inverse_fits(py::handle gram) {
  [[maybe_unused]] const TensorView g = view_gram(gram);
  bool fits = true;
  PKT_DISPATCH("cholesky_inverse", g, (void)0, fits = cholesky_inverse_fits_cuda(g.shape[1]));
  return fits;
}

void cholesky_inverse(py::handle gram, py::handle lower, py::handle inverse, py::handle pivot,
                      int threads, uintptr_t stream) {
  const TensorView g = view_gram(gram);
  const int64_t batch = g.shape[0], size = g.shape[1];
  const CholeskyInverseParams p{
      static_cast<const double*>(g.data),
      static_cast<double*>(dense(lower, "lower", DType::f64, g, {batch, size, size}).data),
      static_cast<double*>(dense(inverse, "inverse", DType::f64, g, {batch, size, size}).data),
      static_cast<double*>(dense(pivot, "pivot", DType::f64, g, {batch}).data),
      batch,
      size};
  if (batch == 0) return;
  PKT_DISPATCH("cholesky_inverse", g, cholesky_inverse_cpu(p, threads),
               cholesky_inverse_cuda(p, reinterpret_cast<void*>(stream)));
}

TensorView view_matrix(py::handle matrix) {
  const TensorView a = view_batch(matrix, "matrix", {DType::f32, DType::f64});
  if (a.shape[1] < a.shape[2]) {
    throw py::value_error("matrix: expected no more columns than rows, got shape " + shape_text(a));
  }
  return a;
}

SmallSvdParams describe(const TensorView& matrix) {
  SmallSvdParams p{};
  p.matrix = matrix.data;
  p.dtype = matrix.dtype;
  p.batch = matrix.shape[0];
  p.rows = matrix.shape[1];
  p.cols = matrix.shape[2];
  return p;
}

int64_t small_svd_workspace(py::handle matrix) {
  const TensorView a = view_matrix(matrix);
  int64_t count = 0;
  PKT_DISPATCH("small_svd", a, (void)0, count = small_svd_workspace_cuda(describe(a)));
  return count;
}

void small_svd(py::handle matrix, py::handle left, py::handle values, py::handle right,
               py::handle workspace, py::handle sweeps, int threads, uintptr_t stream) {
  const TensorView a = view_matrix(matrix);
  SmallSvdParams p = describe(a);
  const TensorView w = view(workspace, "workspace", 1, {a.dtype});
  if (w.shape[0] != 0) {
    p.workspace = dense(workspace, "workspace", a.dtype, a, {p.batch * p.rows * p.cols}).data;
  }
  p.left = dense(left, "left", a.dtype, a, {p.batch, p.rows, p.cols}).data;
  p.values = dense(values, "values", a.dtype, a, {p.batch, p.cols}).data;
  p.right = dense(right, "right", a.dtype, a, {p.batch, p.cols, p.cols}).data;
  p.sweeps = static_cast<int64_t*>(dense(sweeps, "sweeps", DType::i64, a, {p.batch}).data);
  if (p.batch == 0 || p.cols == 0) return;
  PKT_DISPATCH("small_svd", a, small_svd_cpu(p, threads),
               small_svd_cuda(p, reinterpret_cast<void*>(stream)));
}

}  // namespace

void bind_small_svd(py::module_& m) {
  m.def("cholesky_inverse_fits", &cholesky_inverse_fits, py::arg("gram"));
  m.def("cholesky_inverse", &cholesky_inverse, py::arg("gram"), py::arg("lower"),
        py::arg("inverse"), py::arg("pivot"), py::arg("threads"), py::arg("stream"));
  m.def("small_svd_workspace", &small_svd_workspace, py::arg("matrix"));
  m.def("small_svd", &small_svd, py::arg("matrix"), py::arg("left"), py::arg("values"),
        py::arg("right"), py::arg("workspace"), py::arg("sweeps"), py::arg("threads"),
        py::arg("stream"));
}

}  // namespace pkt
