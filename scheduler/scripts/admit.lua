-- Batches of an inbox are in the document log: queue the shard that has them, take their messages away and tell the producers,
-- in one step. A message that is gone already is somebody else's who admitted it: no second receipt.
-- include: turns adding
-- KEYS[1]  prefix of the namespace
-- ARGV     name of the inbox, 1 or 0 for whether a task follows, that task as add_tasks takes it; then for each message, 500 at
--          most: id, key, name of the receipts stream (empty: none), receipt (JSON), how many refused entries follow, and for
--          each of those how many fields and values, and these
-- reply    ids of the messages that were taken away
local REFUSED_KEPT, REFUSED_BYTES, REFUSED_NAME_BYTES, REFUSED_MS = 1000, 65536, 100, 604800000
local RECEIPTS_KEPT, RECEIPTS_MS = 100000, 86400000
local stream = prefix .. ':inbox:' .. ARGV[1]
local keys, bytes, refused = stream .. ':keys', stream .. ':bytes', stream .. ':refused'
local at = 3
also_when_full()
if ARGV[2] == '1' then
  local _, behind = add_tasks(3)
  at = behind
end

local function forget_key(key, id)
  local waiting = redis.call('HGET', keys, key)
  local its_id, its_bytes = string.match(waiting or '', '(%S+) (%S+)')
  if its_id == id then
    redis.call('HDEL', keys, key)
    redis.call('DECRBY', bytes, its_bytes)
  end
end

-- The refused entry whose fields and values are ARGV[first] to ARGV[last]. Its reason comes last, and is not what is cut.
local function keep_refused(first, last)
  local entry, size, left = {}, 0, REFUSED_BYTES
  for i = last - 1, first, -2 do
    local name = string.sub(ARGV[i], 1, REFUSED_NAME_BYTES)
    local value = string.sub(ARGV[i + 1], 1, math.max(0, left - #name))
    entry[i - first + 1], entry[i - first + 2] = name, value
    size, left = size + #ARGV[i] + #ARGV[i + 1], left - #name - #value
  end
  if size > REFUSED_BYTES then
    entry[#entry + 1], entry[#entry + 2] = 'refused_bytes', size
  end
  redis.call('XADD', refused, 'MAXLEN', '~', REFUSED_KEPT, '*', unpack(entry))
  redis.call('PEXPIRE', refused, REFUSED_MS)
end

local taken = {}
while at <= #ARGV do
  local id, key, reply, receipt, entries = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], tonumber(ARGV[at + 4])
  at = at + 5
  local ours = redis.call('XDEL', stream, id) == 1
  if ours then
    taken[#taken + 1] = id
    forget_key(key, id)
    if reply ~= '' then
      local receipts = prefix .. ':receipts:' .. reply
      redis.call('XADD', receipts, 'MAXLEN', '~', RECEIPTS_KEPT, '*', 'receipt', receipt)
      redis.call('PEXPIRE', receipts, RECEIPTS_MS)
    end
  end
  for _ = 1, entries do
    local count = tonumber(ARGV[at])
    if ours then
      keep_refused(at + 1, at + count)
    end
    at = at + 1 + count
  end
end
return taken
