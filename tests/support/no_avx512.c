/* Hides AVX-512 and AMX from a program, so that it computes as on a processor that has neither:

       cc -shared -fPIC -O2 -o no_avx512.so tests/support/no_avx512.c
       LD_PRELOAD=$PWD/no_avx512.so python ...

   XLA_FLAGS=--xla_cpu_max_isa=AVX2 does that for the code that XLA generates, but not for the libraries that it calls
   for products of matrices. They ask the processor. Here the kernel lets the instruction CPUID fail (Intel: the flag
   cpuid_fault in /proc/cpuinfo), and a handler of the signal answers in its place. Programs that are started inherit
   it with LD_PRELOAD; those that are linked statically do not, and those that handle signals without the C library, as
   programs written in Go do (wandb's), fail. Where the kernel or the processor cannot do this, the program ends at once
   with a message. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { SET_CPUID = 0x1012 }; /* ARCH_SET_CPUID of arch_prctl(2) */

static int (*set_handler)(int, const struct sigaction *, struct sigaction *);
static struct sigaction of_program; /* the handler of SIGSEGV that the program has asked for */

static long allow_cpuid(long allowed) { return syscall(SYS_arch_prctl, SET_CPUID, allowed); }

static void hide(unsigned leaf, unsigned part, unsigned *a, unsigned *b, unsigned *c, unsigned *d) {
    if (leaf != 7) return;
    if (part == 0) {
        *b &= ~(1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31);
        *c &= ~(1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14);
        *d &= ~(1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25);
    } else if (part == 1) { /* and the newest extensions of AVX2: processors without AVX-512 rarely have them */
        *a &= ~(1u << 4 | 1u << 5 | 1u << 21 | 1u << 23);
        *d &= ~(1u << 4 | 1u << 5 | 1u << 10 | 1u << 19);
    }
}

static void answer(int signal_, siginfo_t *info, void *context) {
    greg_t *register_ = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *at = (const unsigned char *)register_[REG_RIP];
    if (info->si_code == SI_KERNEL && at[0] == 0x0f && at[1] == 0xa2) { /* CPUID */
        unsigned leaf = register_[REG_RAX], part = register_[REG_RCX], a = leaf, b, c = part, d;
        allow_cpuid(1);
        __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
        allow_cpuid(0);
        hide(leaf, part, &a, &b, &c, &d);
        register_[REG_RAX] = a, register_[REG_RBX] = b, register_[REG_RCX] = c, register_[REG_RDX] = d;
        register_[REG_RIP] += 2;
    } else if (of_program.sa_flags & SA_SIGINFO && of_program.sa_sigaction) {
        of_program.sa_sigaction(signal_, info, context);
    } else if (of_program.sa_handler && of_program.sa_handler != SIG_IGN) {
        of_program.sa_handler(signal_);
    } else {
        struct sigaction usual;
        memset(&usual, 0, sizeof usual);
        usual.sa_handler = SIG_DFL;
        set_handler(SIGSEGV, &usual, NULL); /* the instruction is tried again, and ends the program */
    }
}

/* Takes the place of the C library's function: a program must not replace the handler above. */
int sigaction(int signal_, const struct sigaction *new_, struct sigaction *old) {
    if (!set_handler) *(void **)&set_handler = dlsym(RTLD_NEXT, "sigaction");
    if (signal_ != SIGSEGV) return set_handler(signal_, new_, old);
    if (old) *old = of_program;
    if (new_) of_program = *new_;
    return 0;
}

__attribute__((constructor)) static void begin(void) {
    struct sigaction handler;
    memset(&handler, 0, sizeof handler);
    handler.sa_sigaction = answer;
    handler.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    *(void **)&set_handler = dlsym(RTLD_NEXT, "sigaction");
    if (set_handler(SIGSEGV, &handler, NULL) || allow_cpuid(0)) {
        static const char message[] = "no_avx512: this machine cannot hide what its processor can do\n";
        const long unused = write(STDERR_FILENO, message, sizeof message - 1);
        (void)unused;
        _exit(2);
    }
}
