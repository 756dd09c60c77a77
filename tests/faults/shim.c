// Preloaded into a process, counts the calls that change or sync files below one folder, and makes the nth of them fail with an
// errno, kill the process, or interrupt it. A failing or killing write writes half of its bytes first. It can also log every
// change.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { KILL = -1, INTERRUPT = -2 };  // other actions are an errno

static char folder[PATH_MAX];
static int armed, action, for_good, log_file = -1;
static long count, target;

void shim_arm(const char* below, long nth, int what, int again) {
  snprintf(folder, sizeof folder, "%s", below);
  count = 0, target = nth, action = what, for_good = again, armed = 1;
}
void shim_disarm(void) { armed = 0; }
long shim_count(void) { return count; }
// Logs changes to a file outside the folder; NULL ends it.
void shim_log(const char* path) {
  if (log_file >= 0) syscall(SYS_close, log_file);
  log_file = path ? (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC, 0600) : -1;
}

#define REAL(name)               \
  static __typeof__(&name) real; \
  if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

// The absolute path of one relative to an open folder.
static const char* absolute(int at, const char* path, char* buffer) {
  char link[64], base[PATH_MAX];
  if (path[0] == '/') return path;
  snprintf(link, sizeof link, at == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", at);
  ssize_t length = readlink(link, base, sizeof base - 1);
  if (length < 0) return path;
  base[length] = 0;
  snprintf(buffer, PATH_MAX, "%.2000s/%.2000s", base, path);
  return buffer;
}
static int below(const char* path) { return armed && strncmp(path, folder, strlen(folder)) == 0; }
static int of_descriptor(int descriptor, char* buffer) {
  char link[64];
  if (!armed) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, buffer, PATH_MAX - 1);
  if (length < 0) return 0;
  buffer[length] = 0;
  return below(buffer);
}

// True if this call is to fail. Dies here where it kills, and returns after an interrupt was sent.
static int fails(void) {
  count++;
  if (!target || !(count == target || (for_good && count > target))) return 0;
  if (action == INTERRUPT) {
    if (count == target) kill(getpid(), SIGINT);
    return 0;
  }
  return 1;
}
static int die_or_fail(void) {
  if (action == KILL) {
    kill(getpid(), SIGKILL);
    pause();
  }
  errno = action;
  return -1;
}
#define FAULT(is_below) \
  if ((is_below) && fails()) return die_or_fail()

static void record(const char* what, const char* path, const char* other, const void* data, size_t length, long offset) {
  char head[2 * PATH_MAX + 100];
  if (log_file < 0 || !armed) return;
  int size = snprintf(head, sizeof head, "%s\t%s\t%s\t%ld\t%zu\n", what, path, other, offset, length);
  syscall(SYS_write, log_file, head, size);
  if (length) syscall(SYS_write, log_file, data, length);
}

static int opened(int (*real)(int, const char*, int, ...), int at, const char* given, int flags, mode_t mode) {
  char buffer[PATH_MAX];
  const char* path = absolute(at, given, buffer);
  int writes = (flags & O_ACCMODE) != O_RDONLY || (flags & O_CREAT);
  if (writes) FAULT(below(path));
  int existed = syscall(SYS_faccessat, AT_FDCWD, path, F_OK) == 0;
  int descriptor = real(at, given, flags, mode);
  // An unnamed temporary file is in no folder and so in no log.
  if (descriptor >= 0 && writes && below(path) && (flags & O_TMPFILE) != O_TMPFILE) {
    if (!existed) record("create", path, "", 0, 0, 0);
    if (existed && (flags & O_TRUNC)) record("truncate", path, "", 0, 0, 0);
  }
  return descriptor;
}
#define MODE                                                   \
  mode_t mode = 0;                                             \
  if ((flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE) { \
    va_list rest;                                              \
    va_start(rest, flags);                                     \
    mode = va_arg(rest, mode_t);                               \
    va_end(rest);                                              \
  }
static int (*real_openat(void))(int, const char*, int, ...) {
  REAL(openat);
  return real;
}
int open(const char* path, int flags, ...) { MODE return opened(real_openat(), AT_FDCWD, path, flags, mode); }
int open64(const char* path, int flags, ...) { MODE return opened(real_openat(), AT_FDCWD, path, flags | O_LARGEFILE, mode); }
int openat(int at, const char* path, int flags, ...) { MODE return opened(real_openat(), at, path, flags, mode); }
int openat64(int at, const char* path, int flags, ...) { MODE return opened(real_openat(), at, path, flags | O_LARGEFILE, mode); }

static void recorded_write(int descriptor, const char* path, const void* data, ssize_t written) {
  // After the write the descriptor stands behind it, also where it appends.
  if (written > 0) record("write", path, "", data, (size_t)written, (long)(lseek(descriptor, 0, SEEK_CUR) - written));
}
ssize_t write(int descriptor, const void* data, size_t length) {
  REAL(write);
  char path[PATH_MAX];
  int is_below = of_descriptor(descriptor, path);
  if (is_below && fails()) {
    if (length > 1 && action != EINTR) real(descriptor, data, length / 2);  // EINTR says that nothing was written
    return die_or_fail();
  }
  ssize_t written = real(descriptor, data, length);
  if (is_below) recorded_write(descriptor, path, data, written);
  return written;
}
ssize_t writev(int descriptor, const struct iovec* parts, int number) {
  char path[PATH_MAX];
  if (of_descriptor(descriptor, path)) {  // part by part, so that each can fail
    ssize_t total = 0;
    for (int i = 0; i < number; i++) {
      ssize_t written = write(descriptor, parts[i].iov_base, parts[i].iov_len);
      if (written < 0) return total ? total : written;
      total += written;
    }
    return total;
  }
  REAL(writev);
  return real(descriptor, parts, number);
}
int fsync(int descriptor) {
  REAL(fsync);
  char path[PATH_MAX];
  int is_below = of_descriptor(descriptor, path);
  FAULT(is_below);
  int result = real(descriptor);
  if (is_below && result == 0) record("fsync", path, "", 0, 0, 0);
  return result;
}
int fdatasync(int descriptor) { return fsync(descriptor); }
int ftruncate(int descriptor, off_t length) {
  REAL(ftruncate);
  char path[PATH_MAX];
  int is_below = of_descriptor(descriptor, path);
  FAULT(is_below);
  int result = real(descriptor, length);
  if (is_below && result == 0) record("truncate", path, "", 0, 0, (long)length);
  return result;
}
int ftruncate64(int descriptor, off64_t length) { return ftruncate(descriptor, (off_t)length); }
int close(int descriptor) {
  REAL(close);
  char path[PATH_MAX];
  if (of_descriptor(descriptor, path) && fails()) {
    real(descriptor);  // a close that fails has closed
    return die_or_fail();
  }
  return real(descriptor);
}

int renameat(int from_at, const char* from, int to_at, const char* to) {
  REAL(renameat);
  char old[PATH_MAX], new[PATH_MAX];
  const char *source = absolute(from_at, from, old), *path = absolute(to_at, to, new);
  FAULT(below(path));
  int result = real(from_at, from, to_at, to);
  if (result == 0 && below(path)) record("rename", source, path, 0, 0, 0);
  return result;
}
int rename(const char* from, const char* to) { return renameat(AT_FDCWD, from, AT_FDCWD, to); }
int linkat(int from_at, const char* from, int to_at, const char* to, int flags) {
  REAL(linkat);
  char old[PATH_MAX], new[PATH_MAX];
  const char *source = absolute(from_at, from, old), *path = absolute(to_at, to, new);
  FAULT(below(path));
  int result = real(from_at, from, to_at, to, flags);
  if (result == 0 && below(path)) record("link", source, path, 0, 0, 0);
  return result;
}
int link(const char* from, const char* to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }
int unlinkat(int at, const char* given, int flags) {
  REAL(unlinkat);
  char buffer[PATH_MAX];
  const char* path = absolute(at, given, buffer);
  FAULT(below(path));
  int result = real(at, given, flags);
  if (result == 0 && below(path)) record("unlink", path, "", 0, 0, 0);
  return result;
}
int unlink(const char* path) { return unlinkat(AT_FDCWD, path, 0); }
int mkdirat(int at, const char* given, mode_t mode) {
  REAL(mkdirat);
  char buffer[PATH_MAX];
  const char* path = absolute(at, given, buffer);
  FAULT(below(path));
  int result = real(at, given, mode);
  if (result == 0 && below(path)) record("mkdir", path, "", 0, 0, 0);
  return result;
}
int mkdir(const char* path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
