/* What the programs of these tests share: a check that says what was wrong. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/bproc.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(what)                                                                                            \
	do {                                                                                                   \
		int well_ = !!(what), code_ = errno;                                                           \
		if (!well_) {                                                                                  \
			fprintf(stderr, "%s:%d: %s (errno %d: %s)\n", __FILE__, __LINE__, #what, code_,        \
				bproc_strerror(code_));                                                        \
			exit(1);                                                                               \
		}                                                                                              \
	} while (0)
