// fastvit._C: what this installation was built with, and nothing else. pybind11 ties a module to one version of
// Python, so the ops live in libraries of their own that use torch's stable ABI.
#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

// No date and no path: the same sources give the same bytes.
py::dict build_info() {
  py::dict info;
  info["version"] = FASTVIT_VERSION;
  info["compiler"] = compiler();
  info["cxx_standard"] = __cplusplus;
  info["torch"] = FASTVIT_TORCH;
  info["cuda"] = FASTVIT_CUDA;
  info["cutlass"] = FASTVIT_CUTLASS;
  info["cuda_archs"] = py::str(FASTVIT_CUDA_ARCHS).attr("split")();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Build information of fastvit; read it through fastvit.extension.build_info().";
  module.def("build_info", &build_info);
}
