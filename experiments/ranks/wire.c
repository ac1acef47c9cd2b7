// A cable between two hosts: what enters one end leaves the other after a delay, unless it is lost on the way.
//
//   wire A B DELAY_US LOSS_PPM
//
// Makes the Ethernet interfaces A and B (TAP; moved to network namespaces by whoever started it), says "ready", and carries frames until
// it is ended. LOSS_PPM of a million frames are dropped, in either direction, by random numbers that are the same in each run. How many
// bytes a second pass is for the interfaces' own queues (tc). For kernels without netem.
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { FRAME = 1600, FRAMES = 8192 };

struct way {
    int from, to;
    unsigned first, count;
    uint64_t due[FRAMES];
    int length[FRAMES];
    char frame[FRAMES][FRAME];
};

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static int end_of(const char *name) {
    struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI};
    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
    if (fd < 0 || ioctl(fd, TUNSETIFF, &request) < 0) {
        perror(name);
        exit(1);
    }
    return fd;
}

static int lost(uint64_t ppm) {
    static uint64_t x = 88172645463325252ull;
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    return x % 1000000 < ppm;
}

int main(int count, char **arguments) {
    if (count != 5) {
        fprintf(stderr, "usage: wire A B DELAY_US LOSS_PPM\n");
        return 2;
    }
    static struct way ways[2];
    ways[0].from = ways[1].to = end_of(arguments[1]);
    ways[1].from = ways[0].to = end_of(arguments[2]);
    uint64_t delay = strtoull(arguments[3], NULL, 10) * 1000, ppm = strtoull(arguments[4], NULL, 10);
    // Ahead of ranks, which keep their cores busy while they wait.
    struct sched_param first = {.sched_priority = 1};
    if (sched_setscheduler(0, SCHED_FIFO, &first) < 0) perror("SCHED_FIFO");
    prctl(PR_SET_TIMERSLACK, 1000);
    puts("ready");
    fflush(stdout);
    for (;;) {
        uint64_t time = now(), next = UINT64_MAX;
        for (int i = 0; i < 2; i++) {
            struct way *way = &ways[i];
            while (way->count < FRAMES) {
                unsigned last = (way->first + way->count) % FRAMES;
                int length = read(way->from, way->frame[last], FRAME);
                if (length <= 0) break;
                if (lost(ppm)) continue;
                way->length[last] = length, way->due[last] = time + delay, way->count++;
            }
            while (way->count > 0 && way->due[way->first] <= time) {
                // An end that is down yet takes nothing, as a socket with no cable in it.
                if (write(way->to, way->frame[way->first], way->length[way->first]) < 0) {}
                way->first = (way->first + 1) % FRAMES, way->count--;
            }
            if (way->count > 0 && way->due[way->first] < next) next = way->due[way->first];
        }
        struct pollfd ends[2] = {{ways[0].from, POLLIN, 0}, {ways[1].from, POLLIN, 0}};
        uint64_t wait = next == UINT64_MAX ? 1000000000 : (next > (time = now()) ? next - time : 0);
        struct timespec until = {.tv_sec = wait / 1000000000, .tv_nsec = wait % 1000000000};
        ppoll(ends, 2, &until, NULL);
    }
}
