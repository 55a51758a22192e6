// csrc/panels.cpp behind a plain C name, for test_panels.py, which compiles it for one level of vectors.
#include "panels.cpp"

extern "C" void multiply(const float* x, const float* panels, const float* bias, const float* residual, float* out,
                         std::int64_t rows, std::int64_t depth, std::int64_t width, int activation,
                         std::int64_t row, std::int64_t height, std::int64_t first, std::int64_t last) {
  using namespace fastvit;
  const std::optional<Activation> chosen =
      activation < 0 ? std::nullopt : std::optional(static_cast<Activation>(activation));
  const PanelProduct product{x, panels, bias, residual, out, rows, depth, width, chosen};
  FASTVIT_LEVEL::multiply_panels(product, {row, height, first, last});
}
