// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

#include "build_facts.h"

#if defined(PKT_EXT_WITH_CUDA)
#include "core/cuda/runtime.h"
#endif

namespace py = pybind11;

namespace pkt {

// One line an op.
void bind_alignment(py::module_& m);
void bind_low_rank(py::module_& m);
void bind_max_window(py::module_& m);
void bind_neuron_score(py::module_& m);
void bind_sensitivity(py::module_& m);
void bind_small_svd(py::module_& m);
#if defined(PKT_EXT_EMULATED)
void bind_emulation(py::module_& m);
#endif

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = PKT_EXT_VERSION;
  info["compiler"] = PKT_EXT_COMPILER;
  info["cuda_compiler"] = PKT_EXT_CUDA_COMPILER;
  info["cuda_architectures"] = PKT_EXT_CUDA_ARCHS;
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
  info["simd_built"] = "baseline, AVX2, AVX-512";
  __builtin_cpu_init();
  info["simd_used"] = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
                          ? "AVX-512"
                      : __builtin_cpu_supports("avx2") ? "AVX2"
                                                       : "baseline";
#else
  info["simd_built"] = "baseline";
  info["simd_used"] = "baseline";
#endif
  return info;
}

}  // namespace
}  // namespace pkt

PYBIND11_MODULE(PKT_EXT_MODULE, m) {
  m.doc() = "Kernels of pkt_ext; call them through pkt_ext.ops.";
  m.def("build_info", &pkt::build_info);
#if defined(PKT_EXT_WITH_CUDA)
  m.def("cuda_versions", [] {
    const pkt::cuda::Versions v = pkt::cuda::versions();
    return py::make_tuple(v.driver, v.runtime, v.devices);
  });
#endif
  pkt::bind_alignment(m);
  pkt::bind_low_rank(m);
  pkt::bind_max_window(m);
  pkt::bind_neuron_score(m);
  pkt::bind_sensitivity(m);
  pkt::bind_small_svd(m);
#if defined(PKT_EXT_EMULATED)
  pkt::bind_emulation(m);
#endif
}
