/* What jobwatch reads of a process, and what it tells of it.
 * SPDX-License-Identifier: GPL-2.0-or-later */
#define _GNU_SOURCE
#include "inside.h"
#include "jobwatch_parts.h"

#include <sys/socket.h>

#define PLACEHOLDER "nodeinit" /* its name; one that was ordered to stop has a longer one meanwhile */

void flush_packet(struct client *client)
{
	if (client->filled)
		send(client->fd, client->packet, client->filled, MSG_NOSIGNAL);
	client->filled = 0;
}

static void put(struct client *client, struct record *record, const char *arguments)
{
	size_t size = (sizeof(*record) + record->arguments + 3) & ~3UL;

	if (client->filled + size > PACKET_MAX)
		flush_packet(client);
	record->size = (uint16_t)size;
	memset(client->packet + client->filled, 0, size);
	memcpy(client->packet + client->filled, record, sizeof(*record));
	memcpy(client->packet + client->filled + sizeof(*record), arguments, record->arguments);
	client->filled += size;
}

static ssize_t slurp(const struct job *job, const char *name, char *text, size_t size)
{
	char path[32];

	snprintf(path, sizeof(path), "%d/%s", job->pid, name);
	int fd = openat(job->client->proc, path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text, size - 1);
	if (fd >= 0)
		close(fd);
	text[n > 0 ? n : 0] = 0;
	return n;
}

bool read_stat(const struct job *job, struct stat_line *s)
{
	char text[1024];
	long field[50] = { 0 };

	memset(s, 0, sizeof(*s));
	if (slurp(job, "stat", text, sizeof(text)) <= 0)
		return false;
	char *open_ = strchr(text, '('), *close_ = strrchr(text, ')');
	if (!open_ || !close_ || close_ - open_ > 64)
		return false;
	size_t length = close_ - open_ - 1;
	memcpy(s->comm, open_ + 1, length < 15 ? length : 15);
	s->state = close_[2];
	char *at = close_ + 3;
	for (int i = 0; i < 49; i++)
		field[i] = strtol(at, &at, 10);
	s->ppid = field[0];
	s->pgid = field[1];
	s->sid = field[2];
	s->tty = field[3];
	s->threads = field[16];
	s->code = field[48];
	return true;
}

uint64_t print_of(const struct stat_line *s)
{
	uint64_t stopped = s->state == 'T';

	return ((uint64_t)s->ppid << 42) ^ ((uint64_t)s->pgid << 21) ^ (uint64_t)s->sid ^ stopped << 63;
}

bool is_placeholder(const struct stat_line *s)
{
	return !strncmp(s->comm, PLACEHOLDER, sizeof(PLACEHOLDER) - 1);
}

bool was_ordered(const struct stat_line *s)
{
	return s->comm[sizeof(PLACEHOLDER) - 1];
}

static uint32_t id_of(const char *status, const char *key)
{
	const char *line = strstr(status, key);

	return line ? (uint32_t)strtoul(line + strlen(key), NULL, 10) : 0;
}

void tell(struct job *job, const struct stat_line *s)
{
	char status[4096], arguments[ARGUMENTS_MAX + 1];
	struct record r = {
		.kind = RECORD_IS, .state = s->state, .pid = job->pid, .ppid = s->ppid, .pgid = s->pgid, .sid = s->sid,
		.tty = s->tty,
	};

	if (slurp(job, "status", status, sizeof(status)) <= 0)
		return;
	r.uid = id_of(status, "\nUid:");
	r.gid = id_of(status, "\nGid:");
	memcpy(r.comm, s->comm, sizeof(r.comm));
	ssize_t n = slurp(job, "cmdline", arguments, sizeof(arguments));
	r.arguments = n > 0 ? (uint32_t)n : 0;
	put(job->client, &r, arguments);
	job->reported = true;
	job->print = print_of(s);
}

void tell_end(struct job *job, enum record_kind kind)
{
	struct record r = { .kind = kind, .pid = job->pid, .code = job->code };

	if (kind == RECORD_ENDED) {
		if (job->told_end)
			return;
		job->told_end = true;
	}
	put(job->client, &r, "");
}

void tell_stood(struct job *job, char state)
{
	struct record r = { .kind = RECORD_STOOD, .pid = job->pid, .state = state, .code = job->code };

	put(job->client, &r, "");
}
