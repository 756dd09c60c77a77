// The rows of a mixed-task batch, sorted by task: the rows of a task are one matrix.
#pragma once

#include <vector>

#include "cpu/panels.h"
#include "ops/checks.h"

namespace metamask::cpu {

struct Segment {
  int64_t task, begin, rows;  // begin: its first row in the order
};

// Sorts the samples by slot (a counting sort, stable); each sample has `each` rows. Throws c10::ValueError for a slot outside [0,
// tasks).
class Segments {
 public:
  Segments(const at::Tensor& slots, int64_t tasks, int64_t each) : rows(slots.numel() * each), each_(each), counts_(tasks, 0) {
    const int64_t samples = slots.numel();
    const int64_t* slot = data<int64_t>("slots", slots);
    int64_t used = 0;
    for (int64_t i = 0; i < samples; ++i) {
      check_slot(slot[i], tasks, i);
      used += counts_[slot[i]]++ == 0;
      sorted = sorted && (i == 0 || slot[i - 1] <= slot[i]);
    }
    list_.reserve(used);
    int64_t begin = 0;
    for (int64_t task = 0; task < tasks; ++task) {
      if (counts_[task] == 0) continue;
      list_.push_back({task, begin * each, counts_[task] * each});
      const int64_t end = begin + counts_[task];
      if (!sorted) counts_[task] = begin;  // from here on, the place of the task's next sample
      begin = end;
    }
    if (sorted) return;
    order_.resize(samples);
    for (int64_t i = 0; i < samples; ++i) order_[counts_[slot[i]]++] = i;
    for (const Segment& segment : list_) counts_[segment.task] = 1;
  }

  int64_t size() const { return int64_t(list_.size()); }
  const Segment* begin() const { return list_.data(); }
  const Segment* end() const { return list_.data() + list_.size(); }
  const Segment& operator[](int64_t i) const { return list_[i]; }

  bool uses(int64_t task) const { return counts_[task] != 0; }

  // Returns the row of the batch that is row i of the order.
  int64_t source(int64_t i) const { return sorted ? i : order_[i / each_] * each_ + i % each_; }

  // Calls work(row of the order, row of the batch) for all rows, of `columns` elements each.
  template <class Work>
  void each_row(int64_t columns, const Work& work) const {
    if (columns == 0) return;
    const auto some = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) work(i, source(i));
    };
    if (rows * columns < kGrain) return some(0, rows);
    at::parallel_for(0, rows, std::max<int64_t>(kGrain / std::max<int64_t>(columns, 1), 1), some);
  }

  // Returns a matrix whose rows are in the order with its rows as in the batch.
  template <class T>
  at::Tensor put_back(const at::Tensor& ordered) const {
    if (sorted) return ordered;
    at::Tensor batch = at::empty_like(ordered);
    const int64_t columns = ordered.size(1);
    const T* from = data<T>("ordered rows", ordered);
    T* to = mutable_data<T>("rows", batch);
    each_row(columns, [&](int64_t i, int64_t source) { std::copy_n(from + i * columns, columns, to + source * columns); });
    return batch;
  }

  const int64_t rows;
  bool sorted = true;

 private:
  const int64_t each_;
  std::vector<int64_t> counts_, order_;
  std::vector<Segment> list_;
};

// The rows of a contiguous matrix [rows, groups * columns] as T, in the segments' order, the columns of each group padded with
// zeros to a multiple of `unit`. Uses the matrix itself if it is that already.
template <class T>
class OrderedRows {
 public:
  OrderedRows(const at::Tensor& from, const Segments& segments, int64_t groups, int64_t columns, int64_t unit)
      : source_(from.scalar_type() == kScalar<T> ? from : from.to(kScalar<T>)),
        group(round_up(columns, unit)),
        row(groups * group),
        copy_(segments.sorted && group == columns ? 0 : segments.rows * row) {
    const T* const given = metamask::data<T>("rows", source_);
    data = given;
    if (segments.sorted && group == columns) return;
    data = copy_.data;
    segments.each_row(row, [&](int64_t i, int64_t source) {
      for (int64_t g = 0; g < groups; ++g) {
        T* to = copy_.data + i * row + g * group;
        std::copy_n(given + (source * groups + g) * columns, columns, to);
        std::fill_n(to + columns, group - columns, T(0));
      }
    });
  }

 private:
  at::Tensor source_;

 public:
  const T* data;
  const int64_t group, row;  // of a group of columns, and of a row

 private:
  Scratch<T> copy_;
};

}  // namespace metamask::cpu
