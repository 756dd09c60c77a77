// Tables of kernels, one for each instruction set: kGemm_default, kGemm_avx2, ... A kernel's source is compiled once for each set,
// with METAMASK_ISA its name; everything but the table is local to the object. cpu/capability.h chooses the table to run.
#pragma once

#if defined(METAMASK_X86)
#define METAMASK_DECLARE_TABLES(Type, name) \
  extern const Type name##_default;         \
  extern const Type name##_avx2;            \
  extern const Type name##_avx512;          \
  extern const Type name##_avx512_bf16
#else
#define METAMASK_DECLARE_TABLES(Type, name) extern const Type name##_default
#endif

// The table of the set that the source is compiled for.
#define METAMASK_TABLE__(name, isa) name##_##isa
#define METAMASK_TABLE_(name, isa) METAMASK_TABLE__(name, isa)
#define METAMASK_TABLE(name) METAMASK_TABLE_(name, METAMASK_ISA)
