// The activations by name; activations.h has their maths.
#pragma once

namespace fastvit {

enum class Activation { kGelu, kGeluTanh, kQuickGelu, kSilu, kRelu };

}  // namespace fastvit
