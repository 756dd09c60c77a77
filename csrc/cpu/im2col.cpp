// im2col and col2im on the CPU: a row for each place of a convolution's output holds the pixels that the kernel covers there.
// torch's unfold puts them into columns, and making rows of the columns takes as long again.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "ops/checks.h"

namespace metamask::cpu {
namespace {

// A thread takes at least this many elements: about 10 microseconds of work.
constexpr int64_t kGrain = 8192;

// A convolution over images [channels, height, width].
struct Windows {
  int64_t channels, height, width, kernel[2], stride[2], padding[2], dilation[2], out[2];

  Windows(at::IntArrayRef size, at::IntArrayRef kernel_, at::IntArrayRef stride_, at::IntArrayRef padding_,
          at::IntArrayRef dilation_)
      : channels(size[1]), height(size[2]), width(size[3]) {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    for (const auto& [name, values, least] : {std::tuple{"kernel", kernel_, 1}, std::tuple{"stride", stride_, 1},
                                              std::tuple{"padding", padding_, 0}, std::tuple{"dilation", dilation_, 1}}) {
      TORCH_CHECK_VALUE(values.size() == 2 && values[0] >= least && values[1] >= least, name, " must be two integers of at least ",
                        least, ", got ", values);
      TORCH_CHECK_VALUE(std::max(values[0], values[1]) <= kMost, name, " must be at most ", kMost, ", got ", values);
    }
    check_sizes("images", size);
    for (int i = 0; i < 2; ++i) {
      kernel[i] = kernel_[i], stride[i] = stride_[i], padding[i] = padding_[i], dilation[i] = dilation_[i];
      out[i] = (size[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) / stride[i] + 1;
      TORCH_CHECK_VALUE(size[2 + i] + 2 * padding[i] > dilation[i] * (kernel[i] - 1), "input must not be smaller than the kernel ",
                        kernel_, " with dilation ", dilation_, ", got ", size);
    }
    check_sizes("the rows of all places", {size[0], out[0], out[1], channels, kernel[0], kernel[1]});
  }

  int64_t places() const { return out[0] * out[1]; }
  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t pixels() const { return height * width; }
  int64_t row() const { return channels * taps(); }
};

void check_pixels(const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble, name,
                   " must be float32 or float64, got ", tensor.scalar_type());
}

// The taps of one place that lie in the image: the column in a channel's part of the row, and the pixel.
struct Taps {
  struct Tap {
    int64_t column, pixel;
  };
  const Windows& windows;
  std::vector<Tap> inside;

  explicit Taps(const Windows& windows) : windows(windows) { inside.reserve(windows.taps()); }

  void move_to(int64_t place) {
    const Windows& of = windows;
    const int64_t top = place / of.out[1] * of.stride[0] - of.padding[0], left = place % of.out[1] * of.stride[1] - of.padding[1];
    inside.clear();
    for (int64_t i = 0; i < of.kernel[0]; ++i) {
      const int64_t y = top + i * of.dilation[0];
      if (y < 0 || y >= of.height) continue;
      for (int64_t j = 0; j < of.kernel[1]; ++j) {
        const int64_t x = left + j * of.dilation[1];
        if (x >= 0 && x < of.width) inside.push_back({i * of.kernel[1] + j, y * of.width + x});
      }
    }
  }
};

at::Tensor im2col(const at::Tensor& input, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                  at::IntArrayRef dilation) {
  check_pixels("input", input);
  TORCH_CHECK_VALUE(input.dim() == 4, "input must be [N, C, H, W], got shape ", input.sizes());
  const Windows windows(input.sizes(), kernel, stride, padding, dilation);
  const int64_t places = windows.places(), taps = windows.taps(), row = windows.row(), pixels = windows.pixels();
  const at::Tensor images = input.contiguous();
  at::Tensor rows = at::empty({input.size(0), places, row}, images.options());
  if (rows.numel() == 0) return rows;
  AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "im2col", [&] {
    const scalar_t* from = data<scalar_t>("input", images);
    scalar_t* to = mutable_data<scalar_t>("rows", rows);
    at::parallel_for(0, input.size(0) * places, std::max<int64_t>(kGrain / std::max<int64_t>(row, 1), 1),
                     [&](int64_t begin, int64_t end) {
                       Taps at(windows);
                       for (int64_t i = begin; i < end; ++i) {
                         at.move_to(i % places);
                         const scalar_t* image = from + i / places * windows.channels * pixels;
                         scalar_t* out = to + i * row;
                         if (int64_t(at.inside.size()) < taps) std::fill_n(out, row, scalar_t(0));
                         for (int64_t c = 0; c < windows.channels; ++c, image += pixels, out += taps) {
                           for (const auto& tap : at.inside) out[tap.column] = image[tap.pixel];
                         }
                       }
                     });
  });
  return rows;
}

at::Tensor col2im(const at::Tensor& grad, at::IntArrayRef size, at::IntArrayRef kernel, at::IntArrayRef stride,
                  at::IntArrayRef padding, at::IntArrayRef dilation) {
  check_pixels("grad", grad);
  TORCH_CHECK_VALUE(size.size() == 4 && *std::min_element(size.begin(), size.end()) >= 0,
                    "size must be that of images, [N, C, H, W], got ", size);
  const Windows windows(size, kernel, stride, padding, dilation);
  const int64_t places = windows.places(), taps = windows.taps(), row = windows.row(), pixels = windows.pixels();
  const std::vector<int64_t> wanted = {size[0], places, row};
  TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef(wanted), "grad must be [N, places, values] = ", at::IntArrayRef(wanted),
                    ", got ", grad.sizes());
  const at::Tensor rows = grad.contiguous();
  at::Tensor images = at::empty(size, rows.options());
  if (images.numel() == 0) return images;
  AT_DISPATCH_FLOATING_TYPES(grad.scalar_type(), "col2im", [&] {
    const scalar_t* from = data<scalar_t>("grad", rows);
    scalar_t* to = mutable_data<scalar_t>("gradient of images", images);
    // A thread has some channels, of some images, to itself: each sum has one order, for any number of threads.
    const int64_t grain = std::max<int64_t>(kGrain / std::max<int64_t>(places * taps, 1), 1);
    at::parallel_for(0, size[0] * windows.channels, grain, [&](int64_t begin, int64_t end) {
      Taps at(windows);
      std::fill(to + begin * pixels, to + end * pixels, scalar_t(0));
      for (int64_t first = begin, last; first < end; first = last) {
        const int64_t image = first / windows.channels, channel = first % windows.channels;
        last = std::min(end, (image + 1) * windows.channels);
        for (int64_t place = 0; place < places; ++place) {
          at.move_to(place);
          const scalar_t* in = from + (image * places + place) * row + channel * taps;
          scalar_t* out = to + first * pixels;
          for (int64_t i = first; i < last; ++i, in += taps, out += pixels) {
            for (const auto& tap : at.inside) out[tap.pixel] += in[tap.column];
          }
        }
      }
    });
  });
  return images;
}

}  // namespace

TORCH_LIBRARY_IMPL(metamask, CPU, library) {
  library.impl("im2col", &im2col);
  library.impl("col2im", &col2im);
}

}  // namespace metamask::cpu
