// What launchers share: pointers of run-time type.
#pragma once

#include "device.cuh"

namespace metamask::cuda {

// Whether every array (a null one is none) may be accessed by packs of kPackBytes.
template <class... Pointers>
bool aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % kPackBytes == 0) && ...);
}

template <class T>
const T* in(const void* pointer) {
  return static_cast<const T*>(pointer);
}

template <class T>
T* out(void* pointer) {
  return static_cast<T*>(pointer);
}

}  // namespace metamask::cuda
