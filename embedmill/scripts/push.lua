-- Put a batch into an inbox, unless it waits there already or the inbox is full.
-- KEYS[1]  prefix of the namespace
-- ARGV     name of the inbox, high water in messages, high water in bytes, idempotency key, bytes of this batch, then the
--          fields and values of the message
-- reply    {1, id} it waits there now | {0, id} it waited there already | {-1, messages, bytes} full: come back later
--
--   inbox:NAME        stream  the messages
--   inbox:NAME:keys   hash    idempotency key -> "ID BYTES" of the message that waits; one that came without a key has none
--   inbox:NAME:bytes  string  bytes of the messages that have a key
local stream = KEYS[1] .. ':inbox:' .. ARGV[1]
local keys, bytes = stream .. ':keys', stream .. ':bytes'
local most, most_bytes, key, size = tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5])

local waiting = redis.call('HGET', keys, key)
if waiting then
  local id, its_bytes = string.match(waiting, '(%S+) (%S+)')
  if redis.call('XRANGE', stream, id, id)[1] then
    return { 0, id }
  end
  redis.call('HDEL', keys, key)
  redis.call('DECRBY', bytes, its_bytes)
end

local length = redis.call('XLEN', stream)
if length == 0 then
  redis.call('DEL', keys, bytes)
end
local held = tonumber(redis.call('GET', bytes) or '0')
if length >= most or (length > 0 and held + size > most_bytes) then
  return { -1, length, held }
end
local id = redis.call('XADD', stream, '*', unpack(ARGV, 6))
redis.call('HSET', keys, key, id .. ' ' .. size)
redis.call('INCRBY', bytes, size)
return { 1, id }
