/* Stands in for NVIDIA's driver and for NCCL where there is neither, as far as ranks call them: the GPU's memory is the process's own, and
 * what ranks send are files of the folder that STAND_IN names. What is begun is done by a thread of its own, in its order, so that whoever
 * waits for it really waits. Sums of all are taken in the reverse order of the ranks, as an order of its own.
 *
 * cc -shared -fPIC -pthread stand_in.c -o libcuda.so && ln -s libcuda.so libnccl.so
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { NOT_READY = 600, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6, FLOAT = 7, MOST = 64 };

/* What is begun, and what of it is done. */

typedef struct Job {
    enum { SEND, RECEIVE, GATHER, REDUCE } what;
    struct Comm *comm;
    const char *from;
    char *to;
    size_t bytes;
    int peer;
    struct Job *next;
} Job;

typedef struct Comm {
    int rank, size, state;
    unsigned sent[MOST], received[MOST];
    char dir[256];
} Comm;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static Job *first, *last, *grouped, *grouped_last;
static uint64_t begun, done;
static int in_group;

static void path(char *out, const Comm *comm, const char *kind, unsigned number, int from, int to) {
    snprintf(out, 300, "%s/%s.%u.%d.%d", comm->dir, kind, number, from, to);
}

static void send_file(Comm *comm, const char *from, size_t bytes, int peer) {
    char open[300], whole[300];
    unsigned number = comm->sent[peer]++;
    path(open, comm, "open", number, comm->rank, peer);
    path(whole, comm, "sent", number, comm->rank, peer);
    FILE *file = fopen(open, "w");
    if (!file || fwrite(from, 1, bytes, file) != bytes || fclose(file) || rename(open, whole)) abort();
}

static void receive_file(Comm *comm, char *to, size_t bytes, int peer) {
    char whole[300];
    path(whole, comm, "sent", comm->received[peer]++, peer, comm->rank);
    FILE *file;
    while (!(file = fopen(whole, "r"))) usleep(100);
    /* One byte more, to see that there is none. */
    char *room = malloc(bytes + 1);
    size_t found = fread(room, 1, bytes + 1, file);
    if (found != bytes) {
        fprintf(stderr, "stand-in: rank %d has sent other than %zu bytes to %d\n", peer, bytes, comm->rank);
        comm->state = INVALID_ARGUMENT;
    } else
        memcpy(to, room, bytes);
    free(room);
    fclose(file);
    unlink(whole);
}

static void gather(Comm *comm, const char *from, char *to, size_t bytes) {
    for (int i = 0; i < comm->size; i++) send_file(comm, from, bytes, i);
    for (int i = 0; i < comm->size; i++) receive_file(comm, to + i * bytes, bytes, i);
}

static void reduce(Comm *comm, const char *from, char *to, size_t bytes) {
    float *parts = malloc(bytes * comm->size), *sum = (float *)to;
    size_t count = bytes / sizeof(float);
    gather(comm, from, (char *)parts, bytes);
    for (size_t i = 0; i < count; i++) {
        float total = parts[(comm->size - 1) * count + i];
        for (int rank = comm->size - 2; rank >= 0; rank--) total += parts[rank * count + i];
        sum[i] = total;
    }
    free(parts);
}

static void *work(void *none) {
    pthread_mutex_lock(&lock);
    for (;;) {
        while (!first) pthread_cond_wait(&changed, &lock);
        Job *job = first;
        pthread_mutex_unlock(&lock);
        if (job->what == SEND) send_file(job->comm, job->from, job->bytes, job->peer);
        if (job->what == RECEIVE) receive_file(job->comm, job->to, job->bytes, job->peer);
        if (job->what == GATHER) gather(job->comm, job->from, job->to, job->bytes);
        if (job->what == REDUCE) reduce(job->comm, job->from, job->to, job->bytes);
        pthread_mutex_lock(&lock);
        first = job->next;
        if (!first) last = NULL;
        free(job);
        done++;
        pthread_cond_broadcast(&changed);
    }
    return none;
}

static void enqueue(Job *job) {
    static int started;
    pthread_mutex_lock(&lock);
    if (!started++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work, NULL)) abort();
    }
    job->next = NULL;
    if (last) last->next = job; else first = job;
    last = job;
    begun++;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

static int begin(Job of) {
    Job *job = malloc(sizeof of);
    *job = of;
    job->next = NULL;
    if (!in_group) { enqueue(job); return 0; }
    if (grouped_last) grouped_last->next = job; else grouped = job;
    grouped_last = job;
    return 0;
}

static void drain(void) {
    pthread_mutex_lock(&lock);
    while (done < begun) pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}

/* The driver. */

static int current;

int cuInit(unsigned flags) { return flags; }
int cuDeviceGetCount(int *count) { *count = getenv("STAND_IN_GPUS") ? atoi(getenv("STAND_IN_GPUS")) : MOST; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetAttribute(int *value, int which, int device) { *value = 0; return which < 0 || device < 0; }
int cuDeviceGetUuid_v2(char *serial, int device) { memset(serial, device, 16); return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &current; return device < 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return device < 0; }
int cuCtxSetCurrent(void *context) { return context != &current; }
int cuCtxGetCurrent(void **context) { *context = &current; return 0; }
int cuGetErrorName(int code, const char **name) { *name = code == NOT_READY ? "CUDA_ERROR_NOT_READY" : "CUDA_ERROR"; return 0; }
int cuGetErrorString(int code, const char **text) { return cuGetErrorName(code, text); }
int cuMemAlloc_v2(void **at, size_t bytes) { *at = bytes ? malloc(bytes) : NULL; return !*at; }
int cuMemFree_v2(void *at) { drain(); free(at); return 0; }
int cuMemsetD8Async(void *at, unsigned char byte, size_t bytes, void *stream) { drain(); memset(at, byte, bytes); return stream != NULL; }
int cuMemcpyHtoDAsync_v2(void *to, const void *from, size_t bytes, void *stream) { drain(); memcpy(to, from, bytes); return stream != NULL; }
int cuMemcpyDtoHAsync_v2(void *to, const void *from, size_t bytes, void *stream) { drain(); memcpy(to, from, bytes); return stream != NULL; }
int cuStreamSynchronize(void *stream) { drain(); return stream != NULL; }
int cuEventCreate(uint64_t **event, unsigned flags) { *event = calloc(1, sizeof **event); return flags > 7; }
int cuEventDestroy_v2(uint64_t *event) { free(event); return 0; }

int cuEventRecord(uint64_t *event, void *stream) {
    pthread_mutex_lock(&lock);
    *event = begun;
    pthread_mutex_unlock(&lock);
    return stream != NULL;
}

int cuEventQuery(const uint64_t *event) {
    pthread_mutex_lock(&lock);
    int ready = done >= *event;
    pthread_mutex_unlock(&lock);
    return ready ? 0 : NOT_READY;
}

/* NCCL. */

typedef struct { char text[128]; } Name;

int ncclGetUniqueId(Name *name) {
    memset(name, 0, sizeof *name);
    const char *place = getenv("NCCL_COMM_ID");
    if (place) {
        snprintf(name->text, sizeof name->text, "at-%s", place);
        return 0;
    }
    uint64_t words[2];
    FILE *random = fopen("/dev/urandom", "r");
    if (!random || fread(words, sizeof words, 1, random) != 1) return INVALID_ARGUMENT;
    fclose(random);
    snprintf(name->text, sizeof name->text, "%016lx%016lx", (unsigned long)words[0], (unsigned long)words[1]);
    return 0;
}

int ncclCommInitRank(Comm **out, int size, Name name, int rank) {
    const char *folder = getenv("STAND_IN");
    if (!folder || size > MOST || rank >= size || !name.text[0]) return INVALID_USAGE;
    Comm *comm = calloc(1, sizeof *comm);
    comm->rank = rank;
    comm->size = size;
    snprintf(comm->dir, sizeof comm->dir, "%s/%s", folder, name.text);
    if (mkdir(comm->dir, 0700) && errno != EEXIST) return INVALID_ARGUMENT;
    int pid = getpid();
    for (int i = 0; i < size; i++) send_file(comm, (char *)&pid, sizeof pid, i);
    char known[300];
    for (int i = 0; i < size; i++) {
        receive_file(comm, (char *)&pid, sizeof pid, i);
        path(known, comm, "pid", i, rank, 0);
        FILE *file = fopen(known, "w");
        fprintf(file, "%d", pid);
        fclose(file);
    }
    *out = comm;
    return 0;
}

/* Whether a rank has ended without taking leave. */
static int is_dead(const Comm *comm, int rank) {
    char known[300], state = 'Z';
    int pid = 0;
    path(known, comm, "pid", rank, comm->rank, 0);
    FILE *file = fopen(known, "r");
    if (!file || fscanf(file, "%d", &pid) != 1) abort();
    fclose(file);
    snprintf(known, sizeof known, "/proc/%d/stat", pid);
    if ((file = fopen(known, "r"))) {
        if (fscanf(file, "%*d (%*[^)]) %c", &state) != 1) state = 'Z';
        fclose(file);
    }
    /* Only now: it may have taken leave since. */
    path(known, comm, "left", 0, rank, 0);
    return state == 'Z' && access(known, F_OK);
}

int ncclCommGetAsyncError(Comm *comm, int *state) {
    for (int i = 0; i < comm->size; i++)
        if (is_dead(comm, i)) comm->state = REMOTE_ERROR;
    *state = comm->state;
    return 0;
}

int ncclCommDestroy(Comm *comm) {
    drain();
    char known[300];
    path(known, comm, "left", 0, comm->rank, 0);
    fclose(fopen(known, "w"));
    free(comm);
    return 0;
}

int ncclGroupStart(void) { in_group = 1; return 0; }

int ncclGroupEnd(void) {
    in_group = 0;
    /* All of a group goes on at once: what is sent does not wait for what is received. */
    for (int receives = 0; receives < 2; receives++)
        for (Job *job = grouped, *next; job; job = next) {
            next = job->next;
            if ((job->what == RECEIVE) == receives) begin(*job);
        }
    for (Job *job = grouped, *next; job; job = next) { next = job->next; free(job); }
    grouped = grouped_last = NULL;
    return 0;
}

int ncclSend(const void *from, size_t count, int kind, int peer, Comm *comm, void *stream) {
    if (stream || kind != FLOAT || peer >= comm->size) return INVALID_ARGUMENT;
    return begin((Job){SEND, comm, from, NULL, count * sizeof(float), peer, NULL});
}

int ncclRecv(void *to, size_t count, int kind, int peer, Comm *comm, void *stream) {
    if (stream || kind != FLOAT || peer >= comm->size) return INVALID_ARGUMENT;
    return begin((Job){RECEIVE, comm, NULL, to, count * sizeof(float), peer, NULL});
}

int ncclAllGather(const void *from, void *to, size_t count, int kind, Comm *comm, void *stream) {
    if (stream || kind == FLOAT) return INVALID_ARGUMENT;
    return begin((Job){GATHER, comm, from, to, count, 0, NULL});
}

int ncclAllReduce(const void *from, void *to, size_t count, int kind, int op, Comm *comm, void *stream) {
    if (stream || kind != FLOAT || op != 0) return INVALID_ARGUMENT;
    return begin((Job){REDUCE, comm, from, to, count * sizeof(float), 0, NULL});
}
