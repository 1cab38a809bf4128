/* The one option bcc asks for. */
#define CONFIG_BPF_SYSCALL 1
