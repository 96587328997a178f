/* Checks what moved processes find at their descriptors: io FOLDER. */
#include "check.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>

static void files(const char *folder)
{
	struct bproc_io_t io[2] = {
		{ .fd = 1, .type = BPROC_IO_FILE }, { .fd = 0, .type = BPROC_IO_MEMFILE },
	};
	char *cat[] = { "cat", NULL }, *environment[] = { NULL }, path[300], text[64] = "";
	char said[] = "out of memory\n";
	int status, fd;

	snprintf(path, sizeof path, "%s/written", folder);
	strcpy(io[0].d.file.name, path);
	io[0].d.file.flags = O_WRONLY | O_CREAT;
	io[0].d.file.mode = 0640;
	io[0].d.file.offset = 2;
	io[1].d.mem.base = said;
	io[1].d.mem.size = sizeof said - 1;
	if (fork() == 0) {
		bproc_execmove_io(1, io, 2, "/bin/cat", cat, environment);
		exit(99);
	}
	CHECK(wait(&status) > 0 && status == 0);
	fd = open(path, O_RDONLY);
	CHECK(fd >= 0 && read(fd, text, sizeof text) == 16 && !memcmp(text, "\0\0out of memory\n", 16));
	close(fd);

	io[0].type = 7;
	CHECK(bproc_move_io(1, io, 1) == -1 && errno == EINVAL);
	CHECK(bproc_move_io(1, io, 17) == -1 && errno == EINVAL);
	io[0].type = BPROC_IO_FILE;
	strcpy(io[0].d.file.name, "/nowhere/at/all");
	if (fork() == 0) {
		CHECK(bproc_move_io(1, io, 1) == -1 && errno == ENOENT);
		exit(bproc_currnode() == 1 ? 0 : 1);
	}
	CHECK(wait(&status) > 0 && status == 0);
}

static void sockets(void)
{
	struct sockaddr_in address = { .sin_family = AF_INET };
	struct bproc_io_t io = { .fd = 1, .type = BPROC_IO_SOCKET, .flags = BPROC_IO_SEND_INFO };
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), peer, pid, info[2];
	socklen_t length = sizeof address;
	char text[16];
	FILE *stream;

	address.sin_addr.s_addr = htonl(INADDR_ANY);
	CHECK(bind(listener, (struct sockaddr *)&address, sizeof address) == 0 && listen(listener, 5) == 0);
	CHECK(getsockname(listener, (struct sockaddr *)&address, &length) == 0);
	memcpy(&io.d.addr, &address, sizeof io.d.addr); /* address 0: where we are now */
	pid = fork();
	if (pid == 0) {
		close(listener);
		CHECK(bproc_move_io(2, &io, 1) == 0);
		CHECK(write(1, "hello\n", 6) == 6);
		exit(0);
	}
	peer = accept(listener, NULL, NULL);
	CHECK(peer >= 0 && read(peer, info, sizeof info) == sizeof info && info[0] == pid && info[1] == 1);
	stream = fdopen(peer, "r");
	CHECK(fgets(text, sizeof text, stream) && !strcmp(text, "hello\n"));
	fclose(stream);
	CHECK(wait(&peer) == pid && peer == 0);
	close(listener);
}

int main(int argc, char **argv)
{
	CHECK(argc == 2);
	files(argv[1]);
	sockets();
	return 0;
}
