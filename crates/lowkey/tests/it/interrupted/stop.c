/* Stops a program at the k-th call that changes something below a folder: put before the C library by LD_PRELOAD.
 *
 * STOP_BELOW  the folder, as an absolute path
 * STOP_AT     k, counted from 1; 0: never
 * STOP_HOW    kill (SIGKILL before the call is made) or full (the call fails with ENOSPC)
 * STOP_COUNT  a file that gets the number of calls when the program ends by itself
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long calls;

static int below(const char *path) {
    const char *root = getenv("STOP_BELOW");
    return root && strncmp(path, root, strlen(root)) == 0;
}

static int below_fd(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n <= 0) return 0;
    path[n] = 0;
    return below(path);
}

static int below_at(int dir, const char *path) {
    if (path[0] == '/') return below(path);
    if (dir != AT_FDCWD) return below_fd(dir);
    char here[PATH_MAX];
    return getcwd(here, sizeof here) && below(here);
}

/* 1: the call is to fail. */
static int stop(void) {
    long at = getenv("STOP_AT") ? atol(getenv("STOP_AT")) : 0;
    if (atomic_fetch_add(&calls, 1) + 1 != at) return 0;
    const char *how = getenv("STOP_HOW");
    if (how && strcmp(how, "kill") == 0) syscall(SYS_kill, getpid(), SIGKILL);
    errno = ENOSPC;
    return 1;
}

__attribute__((destructor)) static void count(void) {
    const char *path = getenv("STOP_COUNT");
    if (!path) return;
    int fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    char text[32];
    int n = snprintf(text, sizeof text, "%ld", atomic_load(&calls));
    if (fd >= 0) syscall(SYS_write, fd, text, (size_t)n);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRAP(result, name, parameters, is_below, arguments) \
    result name parameters {                                \
        if ((is_below) && stop()) return -1;                \
        return NEXT(name) arguments;                        \
    }

WRAP(ssize_t, write, (int fd, const void *b, size_t n), below_fd(fd), (fd, b, n))
WRAP(ssize_t, writev, (int fd, const struct iovec *v, int n), below_fd(fd), (fd, v, n))
WRAP(ssize_t, pwrite, (int fd, const void *b, size_t n, off_t at), below_fd(fd), (fd, b, n, at))
WRAP(ssize_t, pwrite64, (int fd, const void *b, size_t n, off64_t at), below_fd(fd), (fd, b, n, at))
WRAP(ssize_t, copy_file_range, (int a, off64_t *x, int b, off64_t *y, size_t n, unsigned f), below_fd(b), (a, x, b, y, n, f))
WRAP(int, fsync, (int fd), below_fd(fd), (fd))
WRAP(int, fdatasync, (int fd), below_fd(fd), (fd))
WRAP(int, ftruncate, (int fd, off_t n), below_fd(fd), (fd, n))
WRAP(int, ftruncate64, (int fd, off64_t n), below_fd(fd), (fd, n))
WRAP(int, fchmod, (int fd, mode_t m), below_fd(fd), (fd, m))
WRAP(int, rename, (const char *a, const char *b), below_at(AT_FDCWD, a), (a, b))
WRAP(int, renameat2, (int x, const char *a, int y, const char *b, unsigned f), below_at(x, a), (x, a, y, b, f))
WRAP(int, symlink, (const char *a, const char *b), below_at(AT_FDCWD, b), (a, b))
WRAP(int, link, (const char *a, const char *b), below_at(AT_FDCWD, b), (a, b))
WRAP(int, unlink, (const char *a), below_at(AT_FDCWD, a), (a))
WRAP(int, unlinkat, (int x, const char *a, int f), below_at(x, a), (x, a, f))
WRAP(int, rmdir, (const char *a), below_at(AT_FDCWD, a), (a))
WRAP(int, mkdir, (const char *a, mode_t m), below_at(AT_FDCWD, a), (a, m))

#define WRAP_OPEN(name, parameters, is_below, arguments)                \
    int name parameters {                                               \
        va_list list;                                                   \
        va_start(list, flags);                                          \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0; \
        va_end(list);                                                   \
        if ((flags & O_CREAT) && (is_below) && stop()) return -1;       \
        return NEXT(name) arguments;                                    \
    }

WRAP_OPEN(open, (const char *a, int flags, ...), below_at(AT_FDCWD, a), (a, flags, mode))
WRAP_OPEN(open64, (const char *a, int flags, ...), below_at(AT_FDCWD, a), (a, flags, mode))
WRAP_OPEN(openat, (int x, const char *a, int flags, ...), below_at(x, a), (x, a, flags, mode))
WRAP_OPEN(openat64, (int x, const char *a, int flags, ...), below_at(x, a), (x, a, flags, mode))
