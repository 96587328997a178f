/* The call runner: flat position-independent code that the engine puts into a process to make a table of system
 * calls there, with one ptrace stop for the whole table. engine/runner.py mirrors the offsets.
 *
 * Registers on entry: rbx = first row, r12 = number of rows, rbp = the thread's slot. rsp stays the thread's own.
 * A row is 8 x u64: number (low 32 bits) and flags (high 32 bits), six arguments, result.
 *
 * After the table the thread sends itself a signal it ignores: a traced thread stops there. When there is no tracer (any
 * more), nothing stops it and it *heals*: it makes the calls of the heal table (a ghost becomes a ghost again), then puts
 * its mask and every register back and goes on where it was. So a dead tracer never harms a process. FP state is never
 * touched by this code, so it needs no restoring; nor is the kernel's restart block, so an interrupted sleep goes on.
 */
#define SLOT_HEAL_ROWS 0
#define SLOT_HEAL_COUNT 8
#define SLOT_SIGNAL 16
#define SLOT_STUB 24
#define SLOT_MASK 32
#define SLOT_RAX 40
#define SLOT_RBX 48
#define SLOT_RCX 56
#define SLOT_RDX 64
#define SLOT_RSI 72
#define SLOT_RDI 80
#define SLOT_R8 88
#define SLOT_R9 96
#define SLOT_R10 104
#define SLOT_R11 112
#define SLOT_R12 120
#define SLOT_R13 128
#define SLOT_R14 136
#define SLOT_R15 144
#define SLOT_RSP 152
#define SLOT_FLAGS 160

#define FLAG_MUST 1 /* an error ends the table */

    .intel_syntax noprefix
    .text
entry:
    lea r13, [rip + trap]
    jmp rows
    .org 16
child:                      /* at a fixed offset: a thread that waits for its registers is parked here */
    mov eax, 60
    mov edi, 1
    syscall
    hlt
trap:
    mov eax, 39             /* getpid: pids differ between namespaces, so ask */
    syscall
    mov rdi, rax
    mov eax, 186            /* gettid */
    syscall
    mov rsi, rax
    mov rdx, [rbp + SLOT_SIGNAL]
    mov eax, 234            /* tgkill: the stop */
    syscall
    /* Only an abandoned thread comes here. */
    mov rbx, [rbp + SLOT_HEAL_ROWS]
    mov r12, [rbp + SLOT_HEAL_COUNT]
    lea r13, [rip + restore]
rows:
    test r12, r12
    jz done
    mov eax, [rbx]
    mov rdi, [rbx + 8]
    mov rsi, [rbx + 16]
    mov rdx, [rbx + 24]
    mov r10, [rbx + 32]
    mov r8, [rbx + 40]
    mov r9, [rbx + 48]
    syscall
    mov [rbx + 56], rax
    test rax, rax
    jnz 1f
    cmp dword ptr [rbx], 435 /* clone3: the child ends, unless its tracer has other plans */
    je child
1:  cmp rax, -4095
    jb 2f
    test dword ptr [rbx + 4], FLAG_MUST
    jnz done
2:  add rbx, 64
    dec r12
    jmp rows
done:
    jmp r13
restore:
    lea rsp, [rbp + SLOT_FLAGS]
    popfq
    mov rsp, [rbp + SLOT_RSP]
    mov edi, 2              /* SIG_SETMASK; from here on only moves, a handler may run in between */
    lea rsi, [rbp + SLOT_MASK]
    mov edx, 0
    mov r10d, 8
    mov eax, 14
    syscall
    mov rax, [rbp + SLOT_RAX]
    mov rbx, [rbp + SLOT_RBX]
    mov rcx, [rbp + SLOT_RCX]
    mov rdx, [rbp + SLOT_RDX]
    mov rsi, [rbp + SLOT_RSI]
    mov rdi, [rbp + SLOT_RDI]
    mov r8, [rbp + SLOT_R8]
    mov r9, [rbp + SLOT_R9]
    mov r10, [rbp + SLOT_R10]
    mov r11, [rbp + SLOT_R11]
    mov r12, [rbp + SLOT_R12]
    mov r13, [rbp + SLOT_R13]
    mov r14, [rbp + SLOT_R14]
    mov r15, [rbp + SLOT_R15]
    jmp [rbp + SLOT_STUB]   /* the slot's own two instructions: rbp, then rip */
