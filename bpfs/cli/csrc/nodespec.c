/* SPDX-License-Identifier: GPL-2.0-or-later
 * See nodespec.h. */
#define _GNU_SOURCE
#include "nodespec.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define DIGITS 9 /* of the longest number that is looked up at all */
#define SEPARATORS ", \t\r\n"

static const char *const states[] = {"down", "boot", "unavailable", "up", "error", "reboot", "halt", "pwroff", NULL};

struct node {
	int number;
	const char *state, *address; /* point into the text of the status file */
};

/* What one expansion works on. */
struct context {
	const char *mount;
	struct node *node; /* without the master, in order of numbers */
	size_t count;
	struct numbers *found;
	char *error;
	size_t size;
};

void *must_alloc(void *old, size_t size)
{
	void *memory = realloc(old, size ? size : 1);
	if (!memory) {
		static const char text[] = "bpsh: out of memory\n";
		ssize_t ignored = write(2, text, sizeof text - 1);
		(void)ignored;
		_exit(255);
	}
	return memory;
}

char *read_whole(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return NULL;
	size_t room = 4096, length = 0;
	char *text = must_alloc(NULL, room);
	for (;;) {
		ssize_t got = read(fd, text + length, room - length - 1);
		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0) {
			int why = errno;
			close(fd);
			free(text);
			errno = why;
			return NULL;
		}
		if (got == 0)
			break;
		length += (size_t)got;
		if (length + 1 == room)
			text = must_alloc(text, room *= 2);
	}
	close(fd);
	text[length] = 0;
	return text;
}

static int fail(struct context *context, const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	vsnprintf(context->error, context->size, format, arguments);
	va_end(arguments);
	return -1;
}

static void add(struct numbers *found, int number)
{
	if (found->count == found->room)
		found->number = must_alloc(found->number, (found->room = found->room * 2 + 16) * sizeof(int));
	found->number[found->count++] = number;
}

static int by_number(const void *one, const void *other)
{
	const struct node *a = one, *b = other;
	return (a->number > b->number) - (a->number < b->number);
}

/* Lines are `number state mode owner group address`; the address may be missing. */
static void parse_status(struct context *context, char *text)
{
	size_t room = 0;
	char *line_state, *word_state;
	for (char *line = strtok_r(text, "\n", &line_state); line; line = strtok_r(NULL, "\n", &line_state)) {
		char *field[6] = {0};
		int fields = 0;
		for (char *word = strtok_r(line, " ", &word_state); word && fields < 6;
		     word = strtok_r(NULL, " ", &word_state))
			field[fields++] = word;
		if (fields < 2 || !isdigit((unsigned char)*field[0]))
			continue; /* the master is no member of any set */
		if (context->count == room)
			context->node = must_alloc(context->node, (room = room * 2 + 64) * sizeof *context->node);
		struct node *node = &context->node[context->count++];
		node->number = atoi(field[0]);
		node->state = field[1];
		node->address = field[5] && strcmp(field[5], "-") ? field[5] : "";
	}
	if (context->count)
		qsort(context->node, context->count, sizeof *context->node, by_number);
}

static int exists(const struct context *context, int number)
{
	struct node key = {.number = number};
	return context->count &&
	       bsearch(&key, context->node, context->count, sizeof key, by_number) != NULL;
}

/* The decimal number at *text, which is moved behind it; -1 with a sentence when it is too long to be a node's. */
static int parse_number(struct context *context, const char **text)
{
	size_t digits = strspn(*text, "0123456789");
	if (digits > DIGITS)
		return fail(context, "there is no node %.*s", digits > 40 ? 40 : (int)digits, *text);
	int number = atoi(*text);
	*text += digits;
	return number;
}

static const char *skip_prefix(const char *text)
{
	return *text == 'n' || *text == '.' ? text + 1 : text;
}

/* Whether the term looks like `5`, `5-` or `5-10`, each number with n or . before it if you like. */
static int is_range(const char *term)
{
	const char *at = skip_prefix(term);
	size_t digits = strspn(at, "0123456789");
	if (!digits)
		return 0;
	at += digits;
	if (!*at)
		return 1;
	if (*at++ != '-')
		return 0;
	if (!*at)
		return 1;
	at = skip_prefix(at);
	digits = strspn(at, "0123456789");
	return digits && !at[digits];
}

static int is_address(const char *term)
{
	size_t digits = strspn(term, "0123456789");
	if (digits && term[digits] == '.' && term[digits + 1] && !term[digits + strspn(term + digits, "0123456789.")])
		return 1;
	size_t hex = strspn(term, "0123456789abcdefABCDEF");
	return term[hex] == ':' && term[hex + 1] && !term[hex + strspn(term + hex, "0123456789abcdefABCDEF:.")];
}

static int expand_range(struct context *context, const char *term)
{
	const char *at = skip_prefix(term);
	int first = parse_number(context, &at), last = first;
	if (first < 0)
		return -1;
	if (*at == '-' && !at[1]) {
		size_t before = context->found->count;
		for (size_t i = 0; i < context->count; i++)
			if (context->node[i].number >= first)
				add(context->found, context->node[i].number);
		return context->found->count > before ? 0 : fail(context, "there is no node %d or above", first);
	}
	if (*at == '-') {
		at = skip_prefix(at + 1);
		if ((last = parse_number(context, &at)) < 0)
			return -1;
		if (last < first)
			return fail(context, "the range %.40s runs backwards", term);
	}
	for (int number = first; number <= last; number++) {
		if (!exists(context, number))
			return fail(context, "there is no node %d", number);
		add(context->found, number);
	}
	return 0;
}

static int expand_state(struct context *context, const char *term)
{
	const char *word = strncmp(term, "all", 3) ? term : term + 3;
	const char *state = *word == '!' ? word + 1 : strncmp(word, "not", 3) ? word : word + 3;
	int known = 0;
	for (int i = 0; states[i]; i++)
		known |= !strcmp(states[i], state);
	for (size_t i = 0; i < context->count; i++)
		known |= !strcmp(context->node[i].state, state);
	if (!known)
		return fail(context, "'%.40s' is no node, range, state or file of nodes", term);
	for (size_t i = 0; i < context->count; i++)
		if (!strcmp(context->node[i].state, state) == (state == word))
			add(context->found, context->node[i].number);
	return 0;
}

static int expand_self(struct context *context)
{
	char path[4096], target[64];
	snprintf(path, sizeof path, "%s/self", context->mount);
	ssize_t length = readlink(path, target, sizeof target - 1);
	if (length < 0)
		return fail(context, "%s: %s", path, strerror(errno));
	target[length] = 0;
	const char *slash = strrchr(target, '/');
	add(context->found, atoi(slash ? slash + 1 : target));
	return 0;
}

static int expand_term(struct context *context, const char *term)
{
	if (!strcmp(term, "master") || !strcmp(skip_prefix(term), "-1")) {
		add(context->found, MASTER);
		return 0;
	}
	if (!strcmp(term, "self"))
		return expand_self(context);
	if (!strcmp(term, "all")) {
		for (size_t i = 0; i < context->count; i++)
			add(context->found, context->node[i].number);
		return 0;
	}
	if (is_range(term))
		return expand_range(context, term);
	if (is_address(term)) {
		for (size_t i = 0; i < context->count; i++)
			if (!strcmp(context->node[i].address, term)) {
				add(context->found, context->node[i].number);
				return 0;
			}
		return fail(context, "no node has the address %.40s", term);
	}
	return expand_state(context, term);
}

/* Expands the terms of a text, which is changed; of a file when `file` is its name. Returns how many there were. */
static int expand_terms(struct context *context, char *text, const char *file)
{
	int terms = 0;
	char *state;
	for (char *term = strtok_r(text, SEPARATORS, &state); term; term = strtok_r(NULL, SEPARATORS, &state)) {
		int inner = 1;
		if (*term != '@') {
			if (expand_term(context, term) < 0)
				return -1;
		} else if (!term[1]) {
			return fail(context, "'@' names no file");
		} else if (file) {
			return fail(context, "%s: a file of nodes cannot name another file", file);
		} else {
			char *content = read_whole(term + 1);
			if (!content)
				return fail(context, "%s: %s", term + 1, strerror(errno));
			for (char *hash = content; (hash = strchr(hash, '#'));)
				memset(hash, ' ', strcspn(hash, "\n"));
			inner = expand_terms(context, content, term + 1);
			free(content);
			if (inner < 0)
				return -1;
		}
		terms += inner;
	}
	return terms;
}

int nodespec_expand(const char *mount, const char *spec, struct numbers *found, char *error, size_t size)
{
	struct context context = {.mount = mount, .found = found, .error = error, .size = size};
	char path[4096];
	snprintf(path, sizeof path, "%s/status", mount);
	char *status = read_whole(path);
	if (!status)
		return errno == ENOENT ? fail(&context, "no cluster is mounted at %s (bpcluster up starts one)", mount)
				       : fail(&context, "%s: %s", path, strerror(errno));
	parse_status(&context, status);
	char *copy = must_alloc(NULL, strlen(spec) + 1);
	int terms = expand_terms(&context, strcpy(copy, spec), NULL);
	if (terms == 0)
		terms = fail(&context, "the nodespec is empty");
	free(copy);
	free(context.node);
	free(status);
	return terms < 0 ? -1 : 0;
}

char *nodespec_fold(const int *number, size_t count)
{
	/* A number takes at most 11 characters and a comma or dash. */
	char *text = must_alloc(NULL, count * 12 + 1), *at = text;
	*at = 0;
	for (size_t i = 0, last; i < count; i = last + 1) {
		for (last = i; last + 1 < count && number[last] >= 0 && number[last + 1] == number[last] + 1; last++)
			;
		at += sprintf(at, i ? "," : "");
		at += number[i] == MASTER ? sprintf(at, "master") : sprintf(at, "%d", number[i]);
		if (last > i)
			at += sprintf(at, "-%d", number[last]);
	}
	return text;
}
