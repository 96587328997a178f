/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * libnss_beo(8): hosts n5, .5, master and self for the C library's name service switch, nss(5).
 *
 * The names come from /run/bpfs/MOUNT.hosts, which the daemon here replaces whenever it changes: never from the mount
 * itself, for a daemon that hangs would then hang every program that looks up a name.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <nss.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define RUN "/run/bpfs/"
#define MASTER (-1)
#define SELF (-2)
#define NOBODY (-3)

/* A line of the file. */
struct entry {
	int number, family, self; /* self: the node that this machine is, where the file says so */
	unsigned char address[16];
};

/* -- the file ------------------------------------------------------------------------------------------------------ */

/* The name of a mount point as one word, as bpfs.rundir.escape has it. Returns 0, or -1 where it is too long. */
static int escape(const char *mount, char *out, size_t room)
{
	size_t at = 0;

	for (const char *c = mount; *c; c++) {
		int starts = c == mount || c[-1] == '/';

		if (at + 6 > room)
			return -1;
		if (*c == '/')
			continue;
		if (starts && at)
			out[at++] = '-';
		if ((*c >= 'a' && *c <= 'z') || (*c >= 'A' && *c <= 'Z') || (*c >= '0' && *c <= '9') || *c == ':' ||
		    *c == '_' || (*c == '.' && at))
			out[at++] = *c;
		else
			at += (size_t)sprintf(out + at, "\\x%02x", (unsigned char)*c);
	}
	out[at] = 0;
	return at ? 0 : -1;
}

static FILE *open_names(void)
{
	const char *mount = secure_getenv("BPFS");
	char path[4096] = RUN;
	size_t length = strlen(RUN);

	if (!mount || *mount != '/')
		mount = "/bpfs";
	if (escape(mount, path + length, sizeof path - length - sizeof ".hosts") < 0) {
		errno = ENAMETOOLONG;
		return NULL;
	}
	strcat(path, ".hosts");
	return fopen(path, "re");
}

/* The number in "n5" or ".5"; MASTER, SELF; NOBODY for all other names. */
static int number_of(const char *name)
{
	char *end;
	long number;

	if (!strcmp(name, "master") || !strcmp(name, ".-1"))
		return MASTER;
	if (!strcmp(name, "self") || !strcmp(name, ".-2"))
		return SELF;
	if ((*name != 'n' && *name != '.') || name[1] < '0' || name[1] > '9')
		return NOBODY;
	number = strtol(name + 1, &end, 10);
	return *end || number > 0xffffff || (name[1] == '0' && name[2]) ? NOBODY : (int)number;
}

/* The next line that makes sense: "address name alias...". Returns 0, or -1 at the end. */
static int next_entry(FILE *file, struct entry *entry)
{
	char line[512], *rest, *address, *name;

	while (fgets(line, sizeof line, file)) {
		address = strtok_r(line, " \t\n", &rest);
		name = address ? strtok_r(NULL, " \t\n", &rest) : NULL;
		if (!name || *address == '#' || (entry->number = number_of(name)) < MASTER)
			continue;
		entry->self = 0;
		while ((name = strtok_r(NULL, " \t\n", &rest)))
			entry->self |= !strcmp(name, "self");
		entry->family = strchr(address, ':') ? AF_INET6 : AF_INET;
		if (inet_pton(entry->family, address, entry->address) == 1)
			return 0;
	}
	return -1;
}

/* -- answers ------------------------------------------------------------------------------------------------------- */

static enum nss_status fail(enum nss_status status, int error, int *errnop, int *h_errnop)
{
	*errnop = error;
	*h_errnop = status == NSS_STATUS_NOTFOUND ? HOST_NOT_FOUND : status == NSS_STATUS_TRYAGAIN ? NETDB_INTERNAL : NO_RECOVERY;
	return status;
}

/* Where this machine's own entry is not marked (virtual nodes see their master's file), its host name tells. */
static int own_number(void)
{
	char host[256];
	int number;

	if (gethostname(host, sizeof host) < 0)
		return MASTER;
	host[sizeof host - 1] = 0;
	number = *host == 'n' ? number_of(host) : NOBODY;
	return number >= 0 ? number : MASTER;
}

static enum nss_status find(int wanted, struct entry *found, int *errnop, int *h_errnop)
{
	FILE *file = open_names();
	int own = wanted == SELF ? own_number() : wanted, have = 0;
	struct entry entry;

	if (!file)
		return fail(NSS_STATUS_UNAVAIL, errno, errnop, h_errnop);
	/* Its own mark counts more than its host name, and the master's entry serves a host name that is nobody's. */
	while (next_entry(file, &entry) == 0) {
		int better = wanted == SELF && entry.self ? 3 : entry.number == own ? 2 : wanted == SELF && entry.number == MASTER;

		if (better > have)
			*found = entry, have = better;
	}
	fclose(file);
	return have ? NSS_STATUS_SUCCESS : fail(NSS_STATUS_NOTFOUND, ENOENT, errnop, h_errnop);
}

static size_t size_of(int family)
{
	return family == AF_INET ? 4 : 16;
}

/* What the caller's buffer has behind a struct hostent. */
struct answer {
	char *aliases[2], *addresses[2];
	unsigned char address[16];
	char name[16], alias[16];
};

static void *aligned(char *buffer, size_t *room, size_t size)
{
	size_t skip = -(size_t)buffer % __alignof__(struct answer);

	if (*room < skip + size)
		return NULL;
	*room -= skip + size;
	return buffer + skip;
}

static void name_entry(const struct entry *entry, char name[16], char alias[16])
{
	if (entry->number == MASTER)
		strcpy(name, "master");
	else
		snprintf(name, 16, "n%d", entry->number);
	snprintf(alias, 16, ".%d", entry->number);
}

static enum nss_status answer(const struct entry *entry, struct hostent *host, char *buffer, size_t room, int *errnop,
			      int *h_errnop)
{
	struct answer *made = aligned(buffer, &room, sizeof *made);

	if (!made)
		return fail(NSS_STATUS_TRYAGAIN, ERANGE, errnop, h_errnop);
	memcpy(made->address, entry->address, sizeof made->address);
	name_entry(entry, made->name, made->alias);
	made->aliases[0] = made->alias, made->aliases[1] = NULL;
	made->addresses[0] = (char *)made->address, made->addresses[1] = NULL;
	host->h_name = made->name;
	host->h_aliases = made->aliases;
	host->h_addrtype = entry->family;
	host->h_length = (int)size_of(entry->family);
	host->h_addr_list = made->addresses;
	*h_errnop = NETDB_SUCCESS;
	return NSS_STATUS_SUCCESS;
}

static enum nss_status find_name(const char *name, struct entry *entry, int *errnop, int *h_errnop)
{
	int number = number_of(name);

	if (number == NOBODY)
		return fail(NSS_STATUS_NOTFOUND, ENOENT, errnop, h_errnop);
	return find(number, entry, errnop, h_errnop);
}

/* -- what the C library calls ---------------------------------------------------------------------------------------- */

EXPORT enum nss_status _nss_beo_gethostbyname3_r(const char *name, int family, struct hostent *host, char *buffer,
						 size_t room, int *errnop, int *h_errnop, int32_t *ttl, char **canonical)
{
	struct entry entry;
	enum nss_status status;

	status = find_name(name, &entry, errnop, h_errnop);
	if (status != NSS_STATUS_SUCCESS)
		return status;
	if (entry.family != family) {
		*errnop = 0;
		*h_errnop = NO_DATA;
		return NSS_STATUS_NOTFOUND;
	}
	status = answer(&entry, host, buffer, room, errnop, h_errnop);
	if (ttl)
		*ttl = 0;
	if (canonical && status == NSS_STATUS_SUCCESS)
		*canonical = host->h_name;
	return status;
}

EXPORT enum nss_status _nss_beo_gethostbyname2_r(const char *name, int family, struct hostent *host, char *buffer,
						 size_t room, int *errnop, int *h_errnop)
{
	return _nss_beo_gethostbyname3_r(name, family, host, buffer, room, errnop, h_errnop, NULL, NULL);
}

EXPORT enum nss_status _nss_beo_gethostbyname_r(const char *name, struct hostent *host, char *buffer, size_t room,
						int *errnop, int *h_errnop)
{
	return _nss_beo_gethostbyname2_r(name, AF_INET, host, buffer, room, errnop, h_errnop);
}

EXPORT enum nss_status _nss_beo_gethostbyname4_r(const char *name, struct gaih_addrtuple **tuples, char *buffer,
						 size_t room, int *errnop, int *h_errnop, int32_t *ttl)
{
	struct made {
		struct gaih_addrtuple tuple;
		char name[16], alias[16];
	} *made;
	struct gaih_addrtuple *tuple;
	struct entry entry;
	enum nss_status status;

	status = find_name(name, &entry, errnop, h_errnop);
	if (status != NSS_STATUS_SUCCESS)
		return status;
	made = aligned(buffer, &room, sizeof *made);
	if (!made)
		return fail(NSS_STATUS_TRYAGAIN, ERANGE, errnop, h_errnop);
	name_entry(&entry, made->name, made->alias);
	/* The caller may have brought the first one. */
	tuple = *tuples ? *tuples : &made->tuple;
	memset(tuple, 0, sizeof *tuple);
	tuple->name = made->name;
	tuple->family = entry.family;
	memcpy(tuple->addr, entry.address, size_of(entry.family));
	*tuples = tuple;
	if (ttl)
		*ttl = 0;
	*h_errnop = NETDB_SUCCESS;
	return NSS_STATUS_SUCCESS;
}

static int is_loopback(const void *address, int family)
{
	return family == AF_INET ? *(const unsigned char *)address == 127 : !memcmp(address, &in6addr_loopback, 16);
}

EXPORT enum nss_status _nss_beo_gethostbyaddr2_r(const void *address, socklen_t length, int family, struct hostent *host,
						 char *buffer, size_t room, int *errnop, int *h_errnop, int32_t *ttl)
{
	enum nss_status status = NSS_STATUS_NOTFOUND;
	struct entry entry;
	FILE *file;

	/* This machine's own address is no name of one of its virtual nodes. */
	if ((family != AF_INET && family != AF_INET6) || length != size_of(family) || is_loopback(address, family))
		return fail(status, ENOENT, errnop, h_errnop);
	file = open_names();
	if (!file)
		return fail(NSS_STATUS_UNAVAIL, errno, errnop, h_errnop);
	while (status == NSS_STATUS_NOTFOUND && next_entry(file, &entry) == 0)
		if (entry.family == family && !memcmp(entry.address, address, length))
			status = answer(&entry, host, buffer, room, errnop, h_errnop);
	fclose(file);
	if (ttl)
		*ttl = 0;
	return status == NSS_STATUS_NOTFOUND ? fail(status, ENOENT, errnop, h_errnop) : status;
}

EXPORT enum nss_status _nss_beo_gethostbyaddr_r(const void *address, socklen_t length, int family, struct hostent *host,
						char *buffer, size_t room, int *errnop, int *h_errnop)
{
	return _nss_beo_gethostbyaddr2_r(address, length, family, host, buffer, room, errnop, h_errnop, NULL);
}

/* gethostent(3) is for one thread of a program by its nature; `getent hosts` uses it. */
static __thread FILE *listing;

EXPORT enum nss_status _nss_beo_endhostent(void)
{
	if (listing)
		fclose(listing);
	listing = NULL;
	return NSS_STATUS_SUCCESS;
}

EXPORT enum nss_status _nss_beo_sethostent(int stay_open)
{
	(void)stay_open;
	_nss_beo_endhostent();
	listing = open_names();
	return listing ? NSS_STATUS_SUCCESS : NSS_STATUS_UNAVAIL;
}

EXPORT enum nss_status _nss_beo_gethostent_r(struct hostent *host, char *buffer, size_t room, int *errnop, int *h_errnop)
{
	enum nss_status status;
	struct entry entry;
	long before;

	if (!listing && _nss_beo_sethostent(0) != NSS_STATUS_SUCCESS)
		return fail(NSS_STATUS_UNAVAIL, errno, errnop, h_errnop);
	before = ftell(listing);
	if (next_entry(listing, &entry) < 0)
		return fail(NSS_STATUS_NOTFOUND, ENOENT, errnop, h_errnop);
	status = answer(&entry, host, buffer, room, errnop, h_errnop);
	if (status == NSS_STATUS_TRYAGAIN) /* the same one again, with more room */
		fseek(listing, before, SEEK_SET);
	return status;
}
