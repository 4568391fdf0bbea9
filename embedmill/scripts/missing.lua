-- Which batches do not wait in an inbox.
-- KEYS[1]  prefix of the namespace
-- ARGV     name of the inbox, then idempotency keys, some hundreds at most
-- reply    the keys without a message
local stream = KEYS[1] .. ':inbox:' .. ARGV[1]
local missing = {}
for i = 2, #ARGV do
  local waiting = redis.call('HGET', stream .. ':keys', ARGV[i])
  local id = waiting and string.match(waiting, '%S+')
  if not id or not redis.call('XRANGE', stream, id, id)[1] then
    missing[#missing + 1] = ARGV[i]
  end
end
return missing
