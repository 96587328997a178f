/* Writes an image of itself into FILE and goes on; the one that comes back ends with 55. `image - FILE` brings it back. */
#include "check.h"

#include <fcntl.h>

static void libraries(void)
{
	char *list;

	CHECK(bproc_libclear() == 0 && bproc_liblist(&list) == 0 && !*list);
	free(list);
	CHECK(bproc_libadd("relative") == -1 && errno == EINVAL);
	CHECK(bproc_libadd("/bin/true") == 0 && bproc_libadd("/bin/false") == 0 && bproc_libadd("/bin/true") == 0);
	CHECK(bproc_liblist(&list) == 0 && !memcmp(list, "/bin/true\0/bin/false\0", 22));
	free(list);
	CHECK(bproc_libdel("/bin/true") == 0 && bproc_libdel("/bin/true") == -1 && errno == ENOENT);
	CHECK(bproc_liblist(&list) == 0 && !memcmp(list, "/bin/false\0", 12));
	free(list);
	CHECK(bproc_libclear() == 0);
}

int main(int argc, char **argv)
{
	int fd, size;

	CHECK(argc >= 2);
	if (argc == 3) {
		fd = open(argv[2], O_RDONLY);
		CHECK(fd >= 0);
		bproc_undump(fd);
		CHECK(!"undump returned");
	}
	fd = open(argv[1], O_RDWR | O_CREAT | O_TRUNC, 0600);
	CHECK(fd >= 0);
	size = bproc_dump(fd, 0);
	if (size == 0)
		return 55;
	CHECK(size > 4096 && lseek(fd, 0, SEEK_END) == size);
	CHECK(bproc_dump(fd, 8) == -1 && errno == EINVAL);
	libraries();
	return 0;
}
