/* longlink - a long-distance link between two network namespaces, in user space.
 *
 *     longlink NETNS_A NETNS_B DEVICE  SPEC_AB SPEC_BA  SEED        SPEC = delay_us:bits_per_s:queue_bytes:loss_ppm
 *
 * Makes a TUN device of the given name inside each namespace and carries packets between them until SIGTERM. Each
 * direction is a drop-tail queue in front of a transmitter of fixed rate, then a wire that delays, and that loses
 * single packets at random after they have used the transmitter (as bit errors do). Says "ready" on stdout once the
 * devices exist, and one JSON object of counters at the end.
 *
 * The time at which a packet leaves the transmitter follows when it is accepted, max(now, free) + size / rate, so
 * queue, transmitter and wire of a direction are one FIFO of (due time, packet). The FIFO lies in memory that is
 * mapped twice in a row, so that a record never wraps. While packets are under way the loop ticks every TICK_NS, else
 * it sleeps in poll: arrival times are exact to a tick, and a busy link costs 10,000 wake-ups a second however small
 * the packets are. The scheduler class is SCHED_RR where allowed: load on the machine must not look like a slow link.
 *
 * Devices offer checksum offload and nothing else: no packet is longer than the MTU, so a loss is one packet's loss.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { TICK_NS = 100000, MAX_PACKET = 65536 + 64, VNET_HEADER = 10, PACKETS_PER_TURN = 512 };

struct record {
    uint64_t due_ns;
    uint32_t length;
    uint32_t lost;
};

struct direction {
    const char *name;
    int from, to;
    uint64_t delay_ns, queue_bytes;
    double ns_per_byte;
    uint64_t loss_threshold; /* of 2^32 */
    unsigned char *memory;
    uint64_t capacity, head, tail; /* bytes ever written and read */
    uint64_t free_ns;              /* when the transmitter has sent all it accepted */
    uint64_t packets, bytes, lost, dropped, refused, longest_queue;
};

static volatile sig_atomic_t ending;
static uint64_t random_state;

static void on_signal(int number) {
    (void)number;
    ending = 1;
}

static void die(const char *what, const char *which) {
    fprintf(stderr, "longlink: %s %s: %s\n", what, which, strerror(errno));
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* splitmix64 (Steele, Lea, Flood 2014): one multiplication chain, any seed, full period. */
static uint32_t random32(void) {
    uint64_t z = (random_state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (uint32_t)((z ^ (z >> 31)) >> 32);
}

static int open_tun(const char *netns, const char *device) {
    char path[256];
    snprintf(path, sizeof path, "/run/netns/%s", netns);
    int ns = open(path, O_RDONLY | O_CLOEXEC);
    if (ns < 0 || setns(ns, CLONE_NEWNET) < 0) die("cannot enter the network namespace", netns);
    close(ns);
    int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) die("cannot open", "/dev/net/tun");
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR};
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", device);
    if (ioctl(fd, TUNSETIFF, &request) < 0) die("cannot make the device", device);
    if (ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM) < 0) die("cannot set offloads of", device);
    return fd;
}

/* The same pages twice in a row: what runs over the end of the first copy is the start of the second. */
static unsigned char *map_twice(uint64_t size) {
    int fd = memfd_create("longlink", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)size) < 0) die("cannot make", "the queue");
    unsigned char *area = mmap(NULL, size * 2, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (area == MAP_FAILED) die("cannot map", "the queue");
    for (int copy = 0; copy < 2; copy++)
        if (mmap(area + size * (uint64_t)copy, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED)
            die("cannot map", "the queue");
    close(fd);
    return area;
}

static void set_up(struct direction *d, const char *spec, int from, int to) {
    uint64_t delay_us, rate, queue, ppm;
    if (sscanf(spec, "%" SCNu64 ":%" SCNu64 ":%" SCNu64 ":%" SCNu64, &delay_us, &rate, &queue, &ppm) != 4 || !rate ||
        ppm > 1000000) {
        fprintf(stderr, "longlink: %s is no delay_us:bits_per_s:queue_bytes:loss_ppm\n", spec);
        exit(2);
    }
    d->from = from;
    d->to = to;
    d->delay_ns = delay_us * 1000;
    d->ns_per_byte = 8e9 / (double)rate;
    d->queue_bytes = queue;
    d->loss_threshold = (uint64_t)((double)ppm * 4294.967296);
    /* Small packets take more room here than on the wire: twice the bytes under way, and some. */
    uint64_t need = 2 * ((uint64_t)((double)d->delay_ns / d->ns_per_byte) + queue) + (4u << 20);
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    d->capacity = (need + page - 1) / page * page;
    d->memory = map_twice(d->capacity);
}

static int has_room(const struct direction *d) {
    return d->capacity - (d->head - d->tail) >= sizeof(struct record) + MAX_PACKET + 16;
}

/* Take what has arrived; returns whether there may be more. */
static int accept_packets(struct direction *d) {
    static unsigned char scrap[MAX_PACKET];
    uint64_t now = now_ns();
    for (int turn = 0; turn < PACKETS_PER_TURN; turn++) {
        int room = has_room(d);
        unsigned char *slot = d->memory + d->head % d->capacity;
        unsigned char *place = room ? slot + sizeof(struct record) : scrap;
        ssize_t length = read(d->from, place, MAX_PACKET);
        if (length <= VNET_HEADER) return 0;
        uint64_t size = (uint64_t)length - VNET_HEADER;
        uint64_t start = d->free_ns > now ? d->free_ns : now;
        uint64_t queued = (uint64_t)((double)(start - now) / d->ns_per_byte);
        if (!room || queued + size > d->queue_bytes) {
            d->dropped++;
            continue;
        }
        if (queued + size > d->longest_queue) d->longest_queue = queued + size;
        d->free_ns = start + (uint64_t)((double)size * d->ns_per_byte);
        struct record record = {d->free_ns + d->delay_ns, (uint32_t)length, 0};
        record.lost = d->loss_threshold && random32() < d->loss_threshold;
        memcpy(slot, &record, sizeof record);
        d->head += (sizeof record + (uint64_t)length + 15) & ~(uint64_t)15;
        d->packets++;
        d->bytes += size;
        d->lost += record.lost;
    }
    return 1;
}

static void deliver_packets(struct direction *d) {
    uint64_t until = now_ns() + TICK_NS / 2;
    while (d->tail < d->head) {
        unsigned char *slot = d->memory + d->tail % d->capacity;
        struct record record;
        memcpy(&record, slot, sizeof record);
        if (record.due_ns > until) return;
        if (!record.lost && write(d->to, slot + sizeof record, record.length) < 0) d->refused++;
        d->tail += (sizeof record + record.length + 15) & ~(uint64_t)15;
    }
}

static void wait_for_work(const struct direction *both, int more) {
    struct timespec tick = {0, TICK_NS};
    if (more) return;
    if (both[0].head != both[0].tail || both[1].head != both[1].tail) {
        nanosleep(&tick, NULL);
        return;
    }
    struct pollfd ready[2] = {{.fd = both[0].from, .events = POLLIN}, {.fd = both[1].from, .events = POLLIN}};
    poll(ready, 2, 1000); /* not for ever: a signal may come just before */
    if ((ready[0].revents | ready[1].revents) & (POLLERR | POLLHUP)) nanosleep(&tick, NULL);
}

int main(int count, char **words) {
    if (count != 7) {
        fprintf(stderr, "usage: longlink NETNS_A NETNS_B DEVICE SPEC_AB SPEC_BA SEED\n");
        return 2;
    }
    struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    random_state = strtoull(words[6], NULL, 10);
    int a = open_tun(words[1], words[3]), b = open_tun(words[2], words[3]);
    struct direction both[2] = {{.name = "a_to_b"}, {.name = "b_to_a"}};
    set_up(&both[0], words[4], a, b);
    set_up(&both[1], words[5], b, a);
    prctl(PR_SET_TIMERSLACK, 1000UL);
    struct sched_param priority = {.sched_priority = 1};
    int realtime = sched_setscheduler(0, SCHED_RR, &priority) == 0;
    puts("ready");
    fflush(stdout);
    while (!ending) {
        int more = 0;
        for (int i = 0; i < 2; i++) {
            more |= accept_packets(&both[i]);
            deliver_packets(&both[i]);
        }
        wait_for_work(both, more);
    }
    printf("{\"realtime\": %s", realtime ? "true" : "false");
    for (int i = 0; i < 2; i++)
        printf(", \"%s\": {\"packets\": %" PRIu64 ", \"bytes\": %" PRIu64 ", \"lost\": %" PRIu64 ", \"dropped\": %" PRIu64
               ", \"refused\": %" PRIu64 ", \"longest_queue_bytes\": %" PRIu64 "}",
               both[i].name, both[i].packets, both[i].bytes, both[i].lost, both[i].dropped, both[i].refused,
               both[i].longest_queue);
    puts("}");
    return 0;
}
