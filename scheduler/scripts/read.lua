-- Messages of an inbox in their order, as many as fit into so many bytes, but always one.
-- KEYS[1]  prefix of the namespace
-- ARGV     name of the inbox, where to begin as XRANGE takes it, how many messages at most, bytes of fields and values
-- reply    a list of {id, {field, value, ...}}
local stream, start, most, limit = KEYS[1] .. ':inbox:' .. ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local found, bytes = {}, 0
while #found < most do
  local entry = redis.call('XRANGE', stream, start, '+', 'COUNT', 1)[1]
  if not entry then
    break
  end
  for _, part in ipairs(entry[2]) do
    bytes = bytes + #part
  end
  if #found > 0 and bytes > limit then
    break
  end
  found[#found + 1] = entry
  start = '(' .. entry[1]
end
return found
