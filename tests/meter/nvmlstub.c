/* A stub libnvidia-ml.so.1 with two GPUs, so that the real nvidia-ml-py runs where there is no driver.
   Clock and power are read from the environment: PT_STUB_SECONDS (time since the start), PT_STUB_WATTS.
   PT_STUB_NO_ENERGY: boards have no energy counter. GPU 1 draws twice what GPU 0 does. */
#include <stdlib.h>
#include <string.h>

typedef struct { unsigned gpu, memory; } utilization;
typedef void *device;
enum { SUCCESS = 0, NOT_SUPPORTED = 3 };

static double from_environment(const char *name) { const char *text = getenv(name); return text ? atof(text) : 0; }
static long number(device d) { return (long)d; }

int nvmlInit_v2(void) { return SUCCESS; }
int nvmlInitWithFlags(unsigned flags) { (void)flags; return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return SUCCESS; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, device *d) { *d = (device)(long)(index + 1); return SUCCESS; }
int nvmlDeviceGetUUID(device d, char *text, unsigned length) {
    strncpy(text, number(d) == 1 ? "GPU-stub-0" : "GPU-stub-1", length);
    return SUCCESS;
}
int nvmlDeviceGetPowerUsage(device d, unsigned *milliwatts) {
    *milliwatts = (unsigned)(1000 * from_environment("PT_STUB_WATTS") * number(d));
    return SUCCESS;
}
int nvmlDeviceGetTotalEnergyConsumption(device d, unsigned long long *millijoules) {
    if (getenv("PT_STUB_NO_ENERGY")) return NOT_SUPPORTED;
    *millijoules = (unsigned long long)(1000 * from_environment("PT_STUB_WATTS") * number(d)
                                        * from_environment("PT_STUB_SECONDS"));
    return SUCCESS;
}
int nvmlDeviceGetUtilizationRates(device d, utilization *rates) {
    rates->gpu = number(d) == 1 ? 50 : 100;
    rates->memory = 0;
    return SUCCESS;
}
