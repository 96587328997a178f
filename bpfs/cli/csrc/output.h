/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * bpsh: what comes from the nodes, on its way to our standard output and error.
 */
#ifndef BPSH_OUTPUT_H
#define BPSH_OUTPUT_H

#include "bpsh.h"

/* One output of one command. */
struct stream {
	int fd;      /* where it comes from, non-blocking; -1: at its end */
	int out;     /* 1 or 2: where it goes */
	int keep;    /* collect it in `text` instead of passing it on */
	char *text;  /* an unfinished line, or all of it when kept */
	size_t length, room;
};

/* Takes what there is to read, once. Closes the stream at its end, or when nobody reads our output any more. */
void stream_pump(struct stream *stream, const struct options *options, int node);

/* Takes all that can be read without waiting, and closes. */
void stream_finish(struct stream *stream, const struct options *options, int node);

/* Some of it could not be written, and nobody closed his end. */
extern int output_failed;

/* Writes all of it to standard output. */
void print_bytes(const char *text, size_t length);

/* Writes a JSON string. Bytes that are no UTF-8 become \udcXX, as Python's surrogateescape has them. */
void print_json_string(const char *text, size_t length);

#endif
