/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * bpsh: runs a program of the master on nodes. See bpsh(1).
 *
 * For one node there is nothing in between: bpsh writes "PID onexec" with its own pid to the node's migrate file and
 * execs the program, which then runs on the node, while this very process becomes its ghost. Start-up time is all that
 * counts here: a static program, and not one file is read that is not needed.
 */
#define _GNU_SOURCE
#include "bpsh.h"

#include "nodespec.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <pwd.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifndef BPFS_VERSION
#define BPFS_VERSION "unknown"
#endif

static const char usage_text[] =
	"usage: bpsh [OPTIONS] NODES COMMAND [ARGUMENTS]\n"
	"       bpsh [OPTIONS] -a|-A COMMAND [ARGUMENTS]\n"
	"Runs a program of the master on nodes. Options may stand before or after NODES, which is a nodespec:\n"
	"5  5-10  5-  n5  master  self  all  up  allup  notup  !down  @file, separated by commas.\n"
	"\n"
	"which nodes\n"
	"  -a                 all nodes that are up\n"
	"  -A                 all nodes that are not down\n"
	"  --map MAP          one command for each number of a job map such as -1:0:0:2, instead of NODES\n"
	"  --expand NODES     print the numbers of the nodes and exit\n"
	"input and output\n"
	"  -n                 standard input is /dev/null\n"
	"  -N                 standard input, output and error are /dev/null\n"
	"  -I FILE  --stdin FILE   standard input from a file on the node\n"
	"  -O FILE  --stdout FILE  standard output to a file on the node\n"
	"  -E FILE  --stderr FILE  standard error to a file on the node\n"
	"  -T                 a terminal on the node, whatever standard input and output are\n"
	"several nodes\n"
	"  -L                 whole lines, never mixed\n"
	"  -p                 each line with the number of its node before it (implies -L)\n"
	"  -s                 the output of one node after that of another\n"
	"  -d                 with a divider before each (implies -s)\n"
	"  -g, --gather       nodes with the same output in one block\n"
	"  --json             a JSON object a node, when it is done\n"
	"  -b BYTES           longest line that is kept whole (65536)\n"
	"  -t, --time         say how long each node took\n"
	"  --timeout SECONDS  end the command on a node that takes longer\n"
	"  --fanout N         at most N nodes at a time\n"
	"other\n"
	"  --bproc-exit       255 for any death by signal instead of 128+N\n"
	"  --mount DIR        where the cluster is mounted (default: $BPFS or /bpfs)\n"
	"  -l USER            ignored, for those who take this for rsh\n"
	"  -h, --help         show this text and exit\n"
	"  -v, --version      show the version and exit\n"
	"\n"
	"A command of one word with blanks or shell characters goes to sh -c on the node, unless -- stands before it.\n"
	"Exit code: the largest of the commands'; 128+N where one died of signal N; 124 timeout; 125 it could not run\n"
	"on its node; 126, 127 the program cannot be run, or found; 255 a node or the cluster failed; 2 a wrong command line.\n";

enum { OPT_TIMEOUT = 256, OPT_FANOUT, OPT_JSON, OPT_BPROC_EXIT, OPT_MOUNT, OPT_EXPAND, OPT_MAP };

static const struct option long_options[] = {
	{"help", no_argument, NULL, 'h'},
	{"version", no_argument, NULL, 'v'},
	{"stdin", required_argument, NULL, 'I'},
	{"stdout", required_argument, NULL, 'O'},
	{"stderr", required_argument, NULL, 'E'},
	{"time", no_argument, NULL, 't'},
	{"gather", no_argument, NULL, 'g'},
	{"timeout", required_argument, NULL, OPT_TIMEOUT},
	{"fanout", required_argument, NULL, OPT_FANOUT},
	{"json", no_argument, NULL, OPT_JSON},
	{"bproc-exit", no_argument, NULL, OPT_BPROC_EXIT},
	{"mount", required_argument, NULL, OPT_MOUNT},
	{"map", required_argument, NULL, OPT_MAP},
	{"expand", required_argument, NULL, OPT_EXPAND},
	{0},
};

void complain(const char *format, ...)
{
	/* One write, so that lines of several processes do not mix. */
	char text[4608];
	va_list arguments;
	va_start(arguments, format);
	int length = snprintf(text, sizeof text, "bpsh: ");
	length += vsnprintf(text + length, sizeof text - 8, format, arguments);
	va_end(arguments);
	if (length > (int)sizeof text - 2)
		length = sizeof text - 2;
	text[length++] = '\n';
	ssize_t ignored = write(2, text, (size_t)length);
	(void)ignored;
}

double now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void __attribute__((noreturn)) wrong_usage(const char *what, const char *subject)
{
	complain("%s%s%s (--help tells the options)", what, subject ? ": " : "", subject ? subject : "");
	exit(2);
}

/* The program that execvp(3) would run, to be freed; NULL when there is none. */
static char *find_program(const char *name)
{
	struct stat status;
	if (strchr(name, '/'))
		return !access(name, X_OK) && !stat(name, &status) && S_ISREG(status.st_mode) ? strdup(name) : NULL;
	const char *path = getenv("PATH");
	if (!path)
		path = "/usr/local/bin:/usr/bin:/bin";
	char *candidate = must_alloc(NULL, strlen(path) + strlen(name) + 4);
	while (*name) {
		size_t length = strcspn(path, ":");
		/* An empty element means the current directory. */
		sprintf(candidate, "%.*s%s%s", (int)length, path, length ? "/" : "./", name);
		if (!access(candidate, X_OK) && !stat(candidate, &status) && S_ISREG(status.st_mode))
			return candidate;
		if (!path[length])
			break;
		path += length + 1;
	}
	free(candidate);
	return NULL;
}

/* The last line of a node's migrate file that speaks of us, behind `PID OUTCOME freeze_ms= total_ms= bytes=`. */
static void last_reason(char *text, char *reason, size_t size)
{
	char *line_state, own[16];
	int length = snprintf(own, sizeof own, "%d ", getpid());
	*reason = 0;
	for (char *line = strtok_r(text, "\n", &line_state); line; line = strtok_r(NULL, "\n", &line_state)) {
		if (strncmp(line, own, (size_t)length))
			continue;
		for (int words = 0; words < 5 && line; words++)
			line = strchr(line, ' ') ? strchr(line, ' ') + 1 : NULL;
		snprintf(reason, size, "%s", line ? line : "");
	}
}

/* What the cluster says about a failed write to a node's migrate file, for people. */
static void complain_move(const struct options *options, int node, int why)
{
	char path[4096], reason[512] = "";
	snprintf(path, sizeof path, "%s/nodes/%d/%s", options->mount, node, why == EHOSTDOWN ? "reason" : "migrate");
	char *text = read_whole(path);
	if (text && why == EHOSTDOWN)
		snprintf(reason, sizeof reason, "%.*s", (int)strcspn(text, "\n"), text);
	else if (text)
		last_reason(text, reason, sizeof reason);
	free(text);
	complain("node %d: %s%s%s", node, strerror(why), *reason ? ": " : "", reason);
}

/* One file of -I, -O or -E, whose name is the next argument. It is opened once more than it has to be, a named pipe
 * excepted, so that what is wrong with it can be said in a sentence: shells say it each in their own way. */
#define OPEN_FILE(name, way)                                                                                         \
	name "=$1; shift; [ -p \"$" name "\" ] || bpsh_w=$({ : " way "\"$" name "\"; } 2>&1) || "                    \
	     "{ echo \"bpsh: cannot open $" name " on the node: ${bpsh_w##*: }\" >&2; exit 125; }; "

/* With -I, -O or -E the files are the node's, so that a shell on the node has to open them: sh -c SCRIPT bpsh FILES
 * COMMAND. */
static char *const *with_redirections(const struct options *options)
{
	static const char *const look[3] = {OPEN_FILE("bpsh_0", "<"), OPEN_FILE("bpsh_1", ">>"), OPEN_FILE("bpsh_2", ">>")};
	static const char *const way[3] = {" <\"$bpsh_0\"", " >\"$bpsh_1\"", " 2>\"$bpsh_2\""};
	char text[1024] = "", tail[128] = "";
	size_t count = 0, words = 0;
	while (options->argv[count])
		count++;
	char **argv = must_alloc(NULL, (count + 8) * sizeof *argv);
	argv[words++] = "sh";
	argv[words++] = "-c";
	argv[words++] = NULL;
	argv[words++] = "bpsh";
	for (int fd = 0; fd < 3; fd++)
		if (options->file[fd]) {
			strcat(text, look[fd]);
			strcat(tail, way[fd]);
			argv[words++] = (char *)options->file[fd];
		}
	argv[words++] = (char *)options->program;
	for (size_t i = 1; i <= count; i++)
		argv[words++] = options->argv[i];
	argv[2] = must_alloc(NULL, sizeof text + sizeof tail + 16);
	sprintf(argv[2], "%sexec \"$@\"%s", text, tail);
	return argv;
}

int prepare_command(const struct options *options, const char *rank, struct command *command)
{
	*command = (struct command){options->program, options->argv};
	setenv("BPROC_RANK", rank, 1);
	setenv("BPROC_PROGNAME", command->program, 1);
	if (options->file[0] || options->file[1] || options->file[2])
		*command = (struct command){"/bin/sh", with_redirections(options)};
	for (int fd = 0; fd < 3; fd++)
		if (options->null[fd] && !options->file[fd]) {
			int null = open("/dev/null", O_RDWR | O_CLOEXEC);
			if (null < 0 || dup2(null, fd) < 0) {
				complain("/dev/null: %s", strerror(errno));
				return EXIT_FAILED;
			}
		}
	return 0;
}

int run_command(const struct command *command)
{
	execv(command->program, command->argv);
	if (errno == ENOEXEC) { /* a script without an interpreter line, as execvp(3) does it */
		size_t count = 0;
		while (command->argv[count])
			count++;
		char **shell = must_alloc(NULL, (count + 2) * sizeof *shell);
		shell[0] = "sh";
		shell[1] = (char *)command->program;
		memcpy(shell + 2, command->argv + 1, count * sizeof *shell);
		execv("/bin/sh", shell);
	}
	complain("%s: %s", command->program, strerror(errno));
	return EXIT_CANNOT_RUN;
}

int run_command_on(const struct options *options, int node, const struct command *command)
{
	char text[4096];

	snprintf(text, sizeof text, "%s/nodes/%d/migrate", options->mount, node);
	int fd = open(text, O_WRONLY | O_CLOEXEC);
	if (fd < 0 && errno == ENOENT) {
		snprintf(text, sizeof text, "%s/status", options->mount);
		if (access(text, F_OK))
			complain("no cluster is mounted at %s (bpcluster up starts one)", options->mount);
		else
			complain("there is no node %d", node);
		return EXIT_FAILED;
	}
	int length = snprintf(text, sizeof text, "%d onexec\n", getpid());
	if (fd < 0 || write(fd, text, (size_t)length) < 0) {
		complain_move(options, node, errno);
		return EXIT_FAILED;
	}
	close(fd);
	return run_command(command);
}

/* Becomes the command of a single node. */
static int become(const struct options *options, int node)
{
	struct command command;
	int failed = prepare_command(options, "0", &command);
	return failed ? failed : run_command_on(options, node, &command);
}

/* Whether ssh(1) would need a shell for this word. */
static int is_shell_text(const char *word)
{
	return strpbrk(word, " \t\n|&;<>()$`\\\"'*?[#~{=") != NULL;
}

/* sshd(8) gives every command the user's SHELL, and GNU parallel's worker, for one, cannot do without. */
static void give_shell(void)
{
	if (getenv("SHELL"))
		return;
	const struct passwd *user = getpwuid(getuid());
	setenv("SHELL", user && *user->pw_shell ? user->pw_shell : "/bin/sh", 1);
}

static double positive(const char *option, const char *text, int whole)
{
	char *end;
	double value = strtod(text, &end);
	if (end == text || *end || !(value > 0) || value > 1e9 || (whole && value != (double)(long)value))
		wrong_usage(option, text);
	return value;
}

/* The nodespec of a job map, as BEOWULF_JOB_MAP holds one: numbers of nodes and colons. */
static char *job_map(const char *map)
{
	if (!*map || map[strspn(map, "0123456789-:")])
		wrong_usage("--map wants numbers of nodes with colons between them", map);
	char *spec = must_alloc(NULL, strlen(map) + 1);
	strcpy(spec, map);
	for (char *colon = spec; (colon = strchr(colon, ':'));)
		*colon = ',';
	return spec;
}

/* What was printed is out; returns the exit code. */
static int printed(void)
{
	if (!fflush(stdout) && !ferror(stdout))
		return 0;
	complain("standard output: %s", strerror(errno));
	return EXIT_OUTPUT;
}

static void take_option(struct options *options, int option, const char **spec)
{
	switch (option) {
	case 'h':
		fputs(usage_text, stdout);
		exit(printed());
	case 'v':
	case 'V':
		puts("bpsh " BPFS_VERSION);
		exit(printed());
	case '1': *spec = "master"; break; /* the nodespec -1 */
	case 'a': *spec = "allup"; break;
	case 'A': *spec = "notdown"; break;
	case 'n': options->null[0] = 1; break;
	case 'N': options->null[0] = options->null[1] = options->null[2] = 1; break;
	case 'I': options->file[0] = optarg; break;
	case 'O': options->file[1] = optarg; break;
	case 'E': options->file[2] = optarg; break;
	case 'T': options->terminal = 1; break;
	case 'L': options->lines = 1; break;
	case 'p': options->lines = options->prefix = 1; break;
	case 's': options->sequential = 1; break;
	case 'd': options->sequential = options->dividers = 1; break;
	case 'g': options->gather = 1; break;
	case 't': options->times = 1; break;
	case 'l': break;
	case 'b': options->buffer = (size_t)positive("-b wants a number of bytes", optarg, 1); break;
	case OPT_TIMEOUT: options->timeout = positive("--timeout wants seconds", optarg, 0); break;
	case OPT_FANOUT: options->fanout = (int)positive("--fanout wants a number", optarg, 1); break;
	case OPT_JSON: options->json = 1; break;
	case OPT_BPROC_EXIT: options->bproc_exit = 1; break;
	case OPT_MAP: *spec = job_map(optarg); break;
	case OPT_MOUNT: options->mount = optarg; break;
	default: exit(2); /* getopt has said why */
	}
}

static int print_nodes(const struct options *options, const char *spec)
{
	struct numbers found = {0};
	char error[4400];
	if (nodespec_expand(options->mount, spec, &found, error, sizeof error) < 0) {
		complain("%s", error);
		return 1;
	}
	for (size_t i = 0; i < found.count; i++)
		printf("%d\n", found.number[i]);
	return printed();
}

int main(int argc, char **argv)
{
	const char *bpfs = getenv("BPFS"), *spec = NULL, *wanted = NULL;
	struct options options = {.mount = bpfs && *bpfs ? bpfs : "/bpfs", .buffer = 65536};
	int literal = 0;

	/* Options, nodes, more options, command: '+' stops at each word that is none, and we go on behind the nodes. */
	while (!options.argv) {
		int option = getopt_long(argc, argv, "+hvV1aAnNI:O:E:TLpsdgtl:b:", long_options, NULL);
		if (option == OPT_EXPAND) {
			wanted = optarg;
		} else if (option != -1) {
			take_option(&options, option, &spec);
		} else if (optind >= argc) {
			break;
		} else if (!spec) {
			spec = argv[optind++];
		} else {
			literal = !strcmp(argv[optind - 1], "--");
			options.argv = argv + optind;
		}
	}
	if (wanted)
		return print_nodes(&options, wanted);
	if (!spec)
		wrong_usage("no nodes given", NULL);
	if (!options.argv || !*options.argv[0])
		wrong_usage("no command given", NULL);

	options.program = find_program(options.argv[0]);
	if (!options.program && options.argv[1] && !strcmp(options.argv[0], "exec")) {
		/* GNU parallel and others expect a shell, and save it a process: there is none here to be saved. */
		options.program = find_program(*++options.argv);
		give_shell();
	}
	if (!options.program && !literal && !options.argv[1] && is_shell_text(options.argv[0])) {
		static char *shell[] = {"sh", "-c", NULL, NULL};
		shell[2] = options.argv[0];
		options.argv = shell;
		options.program = "/bin/sh";
		give_shell();
	}
	if (!options.program) {
		if (strchr(options.argv[0], '/') && !access(options.argv[0], F_OK)) {
			complain("%s: is no program that you may run", options.argv[0]);
			return EXIT_CANNOT_RUN;
		}
		complain("%s: command not found", options.argv[0]);
		return EXIT_NOT_FOUND;
	}

	struct numbers found = {0};
	char error[4400];
	int single = !options.times && !options.gather && !options.json && !options.timeout && !options.prefix &&
		     !options.dividers && !options.bproc_exit &&
		     /* Where ours is a terminal, the command gets it anyway. */
		     (!options.terminal || (isatty(0) && isatty(1) && isatty(2)));
	/* The short way: a plain number needs no look at the cluster's status. */
	if (single && strlen(spec) < 9 && spec[strspn(spec, "0123456789")] == 0 && *spec)
		return become(&options, atoi(spec));
	if (nodespec_expand(options.mount, spec, &found, error, sizeof error) < 0) {
		complain("%s", error);
		return EXIT_FAILED;
	}
	if (!found.count) {
		complain("no node is '%s'", spec);
		return EXIT_FAILED;
	}
	if (single && found.count == 1)
		return become(&options, found.number[0]);
	return run_many(&options, found.number, found.count);
}
