-- Who works.
-- include: turns
-- KEYS[1]  prefix of the namespace
-- reply    per worker: owner, its record (JSON), ms since it last spoke
local found = {}
local seen = redis.call('ZRANGE', prefix .. ':seen', 0, -1, 'WITHSCORES')
for i = 1, #seen, 2 do
  local record = redis.call('HGET', prefix .. ':workers', seen[i])
  if record then
    found[#found + 1] = { seen[i], record, math.max(0, now_ms - tonumber(seen[i + 1])) }
  end
end
return found
