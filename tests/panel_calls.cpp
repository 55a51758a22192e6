// csrc/panels.cpp behind a plain C name, for test_panels.py, which compiles it for one level of vectors.
#include "panels.cpp"

extern "C" void multiply(const float* x, const float* weight, const float* bias, const float* scale,
                         const float* residual, float* out, std::int64_t rows, std::int64_t depth, std::int64_t width,
                         std::int64_t weight_stride, std::int64_t out_stride, int in_panels, int activation,
                         std::int64_t row, std::int64_t height, std::int64_t first, std::int64_t last) {
  using namespace fastvit;
  const std::optional<Activation> chosen =
      activation < 0 ? std::nullopt : std::optional(static_cast<Activation>(activation));
  const PanelProduct product{x,     weight, bias,  scale,         residual,   out,
                             rows,  depth,  width, weight_stride, out_stride, in_panels != 0,
                             chosen};
  FASTVIT_LEVEL::multiply_panels(product, {row, height, first, last});
}
