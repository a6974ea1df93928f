// SPDX-License-Identifier: Apache-2.0
#include "core/binding.h"
#include "max_window/max_window.h"

namespace pkt {
namespace {

MaxWindowParams describe(const TensorView& score, int64_t height, int64_t width) {
  if (height < 1 || height > score.shape[1] || width < 1 || width > score.shape[2]) {
    throw py::value_error("max_window: a window of " + std::to_string(height) + " x " +
                          std::to_string(width) + " does not fit a score matrix of " +
                          std::to_string(score.shape[1]) + " x " + std::to_string(score.shape[2]));
  }
  MaxWindowParams p{};
  p.score = score.data;
  p.dtype = score.dtype;
  p.batch = score.shape[0];
  // Neighbours in memory are neighbours in a row to the kernels.
  p.transposed = score.stride[2] != 1 && score.stride[1] < score.stride[2];
  const int row = p.transposed ? 2 : 1, col = p.transposed ? 1 : 2;
  p.rows = score.shape[row];
  p.cols = score.shape[col];
  p.batch_stride = score.stride[0];
  p.row_stride = score.stride[row];
  p.col_stride = score.stride[col];
  p.height = p.transposed ? width : height;
  p.width = p.transposed ? height : width;
  return p;
}

TensorView view_score(py::handle score) {
  return view(score, "score", 3, {DType::f32, DType::f64, DType::f16, DType::bf16});
}

int64_t workspace(py::handle score, int64_t height, int64_t width) {
  const TensorView s = view_score(score);
  const MaxWindowParams p = describe(s, height, width);
  int64_t count = 0;
  PKT_DISPATCH("max_window", s, count = max_window_workspace_cpu(p),
               count = max_window_workspace_cuda(p));
  return count;
}

void max_window(py::handle score, int64_t height, int64_t width, py::handle row, py::handle col,
                py::handle total, py::handle workspace, int threads, uintptr_t stream) {
  const TensorView s = view_score(score);
  MaxWindowParams p = describe(s, height, width);
  const TensorView r = view(row, "row", 1, {DType::i64});
  const TensorView c = view(col, "col", 1, {DType::i64});
  const TensorView t = view(total, "total", 1, {DType::f64});
  const TensorView w = view(workspace, "workspace", 1, {DType::f64});
  const std::pair<const TensorView*, const char*> outputs[] = {
      {&r, "row"}, {&c, "col"}, {&t, "total"}};
  for (const auto& [out, name] : outputs) {
    check_shape(*out, name, {p.batch});
    check_contiguous(*out, name);
    check_device(*out, name, s);
  }
  check_contiguous(w, "workspace");
  check_device(w, "workspace", s);
  p.row = static_cast<int64_t*>(r.data);
  p.col = static_cast<int64_t*>(c.data);
  p.total = static_cast<double*>(t.data);
  p.workspace = static_cast<double*>(w.data);
  if (p.batch == 0) return;
  PKT_DISPATCH("max_window", s, max_window_cpu(p, threads),
               max_window_cuda(p, reinterpret_cast<void*>(stream)));
}

}  // namespace

void bind_max_window(py::module_& m) {
  m.def("max_window_workspace", &workspace, py::arg("score"), py::arg("height"), py::arg("width"));
  m.def("max_window", &max_window, py::arg("score"), py::arg("height"), py::arg("width"),
        py::arg("row"), py::arg("col"), py::arg("total"), py::arg("workspace"), py::arg("threads"),
        py::arg("stream"));
}

}  // namespace pkt
