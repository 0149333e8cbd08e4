/* A stub libnvidia-ml.so.1 with two GPUs, so that the real nvidia-ml-py runs where there is no driver.
   PT_STUB_FILE names a file of one line per GPU, "joules watts percent", read at every question: what a board's counter
   stands at, what it draws, how busy it is. A board with negative joules has no energy counter. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { unsigned gpu, memory; } utilization;
typedef void *device;
enum { SUCCESS = 0, NOT_SUPPORTED = 3, UNKNOWN = 999 };
typedef struct { double joules, watts, percent; } board;

static int look(device d, board *found) {
    const char *name = getenv("PT_STUB_FILE");
    FILE *file = name ? fopen(name, "r") : NULL;
    long number = (long)d, line = 0;
    if (!file) return UNKNOWN;
    while (line < number && fscanf(file, "%lf %lf %lf", &found->joules, &found->watts, &found->percent) == 3) line++;
    fclose(file);
    return line == number ? SUCCESS : UNKNOWN;
}

int nvmlInit_v2(void) { return SUCCESS; }
int nvmlInitWithFlags(unsigned flags) { (void)flags; return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return SUCCESS; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, device *d) { *d = (device)(long)(index + 1); return SUCCESS; }
int nvmlDeviceGetUUID(device d, char *text, unsigned length) {
    strncpy(text, (long)d == 1 ? "GPU-stub-0" : "GPU-stub-1", length);
    return SUCCESS;
}
int nvmlDeviceGetPowerUsage(device d, unsigned *milliwatts) {
    board found;
    int state = look(d, &found);
    if (state == SUCCESS) *milliwatts = (unsigned)(1000 * found.watts + 0.5);
    return state;
}
int nvmlDeviceGetTotalEnergyConsumption(device d, unsigned long long *millijoules) {
    board found;
    int state = look(d, &found);
    if (state != SUCCESS) return state;
    if (found.joules < 0) return NOT_SUPPORTED;
    *millijoules = (unsigned long long)(1000 * found.joules + 0.5);
    return SUCCESS;
}
int nvmlDeviceGetUtilizationRates(device d, utilization *rates) {
    board found;
    int state = look(d, &found);
    if (state == SUCCESS) { rates->gpu = (unsigned)found.percent; rates->memory = 0; }
    return state;
}
