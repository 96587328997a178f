/* Writes an image of a program that has begun but not run: execdump FILE PROGRAM ARGUMENT.... `image - FILE` has it run. */
#include "check.h"

#include <fcntl.h>

int main(int argc, char **argv)
{
	char *environment[] = { "FROM=before", NULL }, *none[] = { "none", NULL };
	int fd, status;

	CHECK(argc >= 3);
	fd = open(argv[1], O_RDWR | O_CREAT | O_TRUNC, 0600);
	CHECK(fd >= 0);
	CHECK(bproc_execdump(fd, 8, argv[2], argv + 2, environment) == -1 && errno == EINVAL);
	CHECK(bproc_execdump(777, 0, argv[2], argv + 2, environment) == -1 && errno == EBADF);
	CHECK(bproc_execdump(fd, 0, "/no/such/program", none, environment) == -1 && errno == ENOENT);
	CHECK(bproc_execdump(fd, 0, argv[1], none, environment) == -1 && errno == EACCES);
	CHECK(waitpid(-1, NULL, WNOHANG) == -1 && errno == ECHILD && lseek(fd, 0, SEEK_END) == 0);
	if (fork() == 0) {
		bproc_execdump(fd, BPROC_DUMP_EXEC | BPROC_DUMP_OTHER, argv[2], argv + 2, environment);
		CHECK(!"execdump returned");
	}
	CHECK(wait(&status) > 0 && status == 0 && lseek(fd, 0, SEEK_END) > 4096);
	return 0;
}
