/* SPDX-License-Identifier: GPL-2.0-or-later
 * See output.h. */
#define _GNU_SOURCE
#include "output.h"

#include "nodespec.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define READ_SIZE 65536

int output_failed;
static int broken[3]; /* our standard output or error takes nothing any more */

/* Writes all of it; a reader that is slow makes us slow, and with us, through their pipes, the commands. */
static int emit(int out, const char *text, size_t length)
{
	while (length && !broken[out]) {
		ssize_t put = write(out, text, length);
		if (put >= 0) {
			text += put;
			length -= (size_t)put;
		} else if (errno == EAGAIN) { /* somebody else made the shared description non-blocking */
			struct pollfd ready = {.fd = out, .events = POLLOUT};
			poll(&ready, 1, -1);
		} else if (errno != EINTR) {
			if (errno != EPIPE && out != 2)
				complain("standard output: %s", strerror(errno));
			output_failed |= errno != EPIPE;
			broken[out] = 1;
		}
	}
	return broken[out] ? -1 : 0;
}

void print_bytes(const char *text, size_t length)
{
	emit(1, text, length);
}

static void reserve(struct stream *stream, size_t more)
{
	if (stream->length + more > stream->room)
		stream->text = must_alloc(stream->text, stream->room = (stream->length + more) * 2);
}

/* Passes on `length` bytes of whole lines (the last one perhaps without its end). */
static int emit_lines(const struct options *options, int out, int node, const char *text, size_t length)
{
	if (!options->prefix)
		return emit(out, text, length);
	static char *block;
	static size_t room;
	size_t used = 0;
	while (length) {
		const char *end = memchr(text, '\n', length);
		size_t line = end ? (size_t)(end - text) + 1 : length;
		if (used + line + 16 > room)
			block = must_alloc(block, room = (used + line + 16) * 2);
		used += (size_t)sprintf(block + used, "%3d: ", node);
		memcpy(block + used, text, line);
		used += line;
		if (!end)
			block[used++] = '\n';
		text += line;
		length -= line;
	}
	return emit(out, block, used);
}

static void close_stream(struct stream *stream)
{
	close(stream->fd);
	stream->fd = -1;
}

/* Takes `length` new bytes at the end of stream->text. */
static int take(struct stream *stream, const struct options *options, int node, size_t length)
{
	size_t old = stream->length;
	stream->length += length;
	if (stream->keep)
		return 0;
	const char *end = memrchr(stream->text + old, '\n', length);
	size_t ready = end ? (size_t)(end + 1 - stream->text) : 0;
	if (!options->lines || (!ready && stream->length >= options->buffer))
		ready = stream->length;
	int failed = ready ? emit_lines(options, stream->out, node, stream->text, ready) : 0;
	stream->length -= ready;
	memmove(stream->text, stream->text + ready, stream->length);
	return failed;
}

void stream_pump(struct stream *stream, const struct options *options, int node)
{
	reserve(stream, READ_SIZE);
	ssize_t got = read(stream->fd, stream->text + stream->length, READ_SIZE);
	if (got < 0 && (errno == EINTR || errno == EAGAIN))
		return;
	if (got > 0) {
		/* A closed pipe tells the command what a closed pipe tells any program. */
		if (take(stream, options, node, (size_t)got) < 0)
			close_stream(stream);
		return;
	}
	if (stream->length && !stream->keep) {
		emit_lines(options, stream->out, node, stream->text, stream->length);
		stream->length = 0;
	}
	close_stream(stream);
}

void stream_finish(struct stream *stream, const struct options *options, int node)
{
	struct pollfd ready = {.fd = stream->fd, .events = POLLIN};
	while (stream->fd >= 0 && poll(&ready, 1, 0) > 0)
		stream_pump(stream, options, node);
	if (stream->fd < 0)
		return;
	if (stream->length && !stream->keep)
		emit_lines(options, stream->out, node, stream->text, stream->length);
	close_stream(stream);
}

/* Bytes of the UTF-8 character at text, 0 when there is none: RFC 3629, without surrogates and overlong forms. */
static size_t utf8_length(const unsigned char *text, size_t length)
{
	static const struct { unsigned char mask, lead; unsigned least; } form[] = {
		{0x80, 0x00, 0}, {0xe0, 0xc0, 0x80}, {0xf0, 0xe0, 0x800}, {0xf8, 0xf0, 0x10000}};
	for (size_t bytes = 1; bytes <= 4 && bytes <= length; bytes++) {
		if ((*text & form[bytes - 1].mask) != form[bytes - 1].lead)
			continue;
		unsigned code = (unsigned char)(*text & ~form[bytes - 1].mask);
		for (size_t i = 1; i < bytes; i++) {
			if ((text[i] & 0xc0) != 0x80)
				return 0;
			code = code << 6 | (text[i] & 0x3f);
		}
		return code >= form[bytes - 1].least && code <= 0x10ffff && (code < 0xd800 || code > 0xdfff) ? bytes : 0;
	}
	return 0;
}

void print_json_string(const char *text, size_t length)
{
	const unsigned char *at = (const unsigned char *)text, *end = at + length;
	char *json = must_alloc(NULL, length * 6 + 2), *to = json;
	*to++ = '"';
	while (at < end) {
		size_t bytes = utf8_length(at, (size_t)(end - at));
		if (!bytes) {
			to += sprintf(to, "\\udc%02x", *at++);
		} else if (bytes == 1 && (*at < 0x20 || *at == '"' || *at == '\\')) {
			to += *at == '\n' ? sprintf(to, "\\n") : sprintf(to, "\\u%04x", *at);
			at++;
		} else {
			memcpy(to, at, bytes);
			to += bytes;
			at += bytes;
		}
	}
	*to++ = '"';
	emit(1, json, (size_t)(to - json));
	must_alloc(json, 1);
}
