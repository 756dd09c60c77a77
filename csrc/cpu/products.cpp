#include "cpu/products.h"

#include <ATen/Parallel.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>

namespace metamask::cpu {
namespace {

struct Line {
  Pass pass;
  at::ScalarType type;
  float threads, in, out;  // logarithms to base 2
  int64_t rows;
};

struct Table {
  std::vector<Line> lines;
  int64_t fewest_rows = std::numeric_limits<int64_t>::max(), task_rows = 1;
};

// A table once published is kept: a call in another thread may be reading it, and there are few in a process.
std::atomic<const Table*> published = nullptr;

float binary_log(int64_t n) { return std::log2(float(n)); }

}  // namespace

void set_products(const std::vector<ProductLine>& lines, int64_t task_rows) {
  TORCH_CHECK_VALUE(task_rows > 0, "task_rows must be positive, got ", task_rows);
  auto table = std::make_unique<Table>();
  table->task_rows = task_rows;
  for (const auto& [pass, type, threads, in, out, rows] : lines) {
    TORCH_CHECK_VALUE(threads > 0 && in > 0 && out > 0 && rows > 0, "threads, in, out and rows must be positive, got ", threads,
                      ", ", in, ", ", out, " and ", rows);
    table->lines.push_back({pass, type, binary_log(threads), binary_log(in), binary_log(out), rows});
    table->fewest_rows = std::min(table->fewest_rows, rows);
  }
  static std::mutex mutex;
  static std::vector<std::unique_ptr<const Table>> kept;
  const std::lock_guard lock(mutex);
  published = table.get();
  kept.push_back(std::move(table));
}

bool through_blas(Pass pass, at::ScalarType type, int64_t batch, int64_t in, int64_t out) {
  const Table* table = published;
  if (table == nullptr || batch < table->fewest_rows || in == 0 || out == 0) return false;
  const float threads = binary_log(at::in_parallel_region() ? 1 : at::get_num_threads());
  const float wide = binary_log(in), high = binary_log(out);
  float nearest = std::numeric_limits<float>::infinity();
  int64_t rows = std::numeric_limits<int64_t>::max();
  for (const Line& line : table->lines) {
    if (line.pass != pass || line.type != type) continue;
    // A line for another number of threads is taken only where none is nearer in the sizes.
    const float distance = std::abs(line.in - wide) + std::abs(line.out - high) + 2 * std::abs(line.threads - threads);
    if (distance >= nearest) continue;
    nearest = distance;
    rows = line.rows;
  }
  return batch >= rows;
}

bool tasks_through_blas(Pass pass, at::ScalarType type, int64_t batch, int64_t tasks, int64_t in, int64_t out) {
  const Table* table = published;
  return table != nullptr && tasks > 0 && batch / tasks >= table->task_rows && through_blas(pass, type, batch, in, out);
}

}  // namespace metamask::cpu
